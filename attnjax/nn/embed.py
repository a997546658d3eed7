# SPDX-License-Identifier: Apache-2.0
"""From pictures to tokens: linear patches, convolutional stems, token-to-token stems."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnjax.nn.attention import MultiHeadAttention
from attnjax.nn.blocks import Mlp
from attnjax.nn.initializers import LINEAR, fan_in_uniform
from attnjax.nn.norm import LayerNorm
from attnjax.nn.vision import extract_patches
from attnjax.ops import AttentionOutput
from attnjax.ops.linear import linear_attention, orthogonal_projection, positive_features
from attnjax.typing import Array

CONV_STEMS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}
"""Patch size -> (kernel, stride, padding) of the three convolutions of a dagger stem."""

SOFT_SPLITS = {12: ((7, 4, 2), (3, 3, 1), (3, 1, 1)), 16: ((7, 4, 2), (3, 2, 1), (3, 2, 1))}
"""Patch size -> (size, stride, padding) of the three soft splits of a token-to-token stem."""


class PatchEmbed(nn.Module):
    """Linear map of non-overlapping square patches (a convolution with stride = kernel).

    Attributes:
      features: d, the token width.
      patch: side of a patch in pixels.
      dtype: compute dtype.
      kernel_init: draws the kernel `[p, p, c, d]`; None: kernel and bias as PyTorch's convolutions,
        else the bias is 0.
    """

    features: int
    patch: int
    dtype: str = "float32"
    kernel_init: Callable[..., Array] | None = None

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Map `image [b, y, x, c]` to `[b, p, d]`, patches in rows from the top left.

        Raises:
          ValueError: the patch size does not divide the image.
        """
        b, rows, columns, c = image.shape
        p = self.patch
        if rows % p or columns % p:
            raise ValueError(f"patch size {p} does not divide an image of {rows}x{columns}")
        init = self.kernel_init or fan_in_uniform(p * p * c)
        kernel = self.param("kernel", init, (p, p, c, self.features), jnp.float32)
        bias_init = nn.initializers.zeros if self.kernel_init else init
        bias = self.param("bias", bias_init, (self.features,), jnp.float32)
        # One large matrix product; XLA's CPU convolution is several times slower.
        patches = image.astype(self.dtype).reshape(b, rows // p, p, columns // p, p, c)
        patches_bpv = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
        kernel_vd = kernel.reshape(-1, self.features).astype(self.dtype)
        return patches_bpv @ kernel_vd + bias.astype(self.dtype)


class TokenEmbed(nn.Module):
    """Linear map of patches that the data set has already cut out.

    Attributes:
      features: d, the token width.
      dtype: compute dtype.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """Map `patches [b, p, values]` to `[b, p, d]`."""
        init = fan_in_uniform(patches.shape[-1])
        dense = nn.Dense(
            self.features, dtype=self.dtype, kernel_init=init, bias_init=init, name="projection"
        )
        return dense(patches)


class ConvStem(nn.Module):
    """Three convolutions with ReLU between, the last linear ("dagger" models).

    Attributes:
      features: d, the token width.
      patch: 12 or 16, the total stride.
      dtype: compute dtype.
    """

    features: int
    patch: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Map `image [b, y, x, c]` to `[b, p, d]`."""
        x_byxc = image.astype(self.dtype)
        widths = (self.features // 4, self.features // 2, self.features)
        for i, (width, (kernel, stride, padding)) in enumerate(
            zip(widths, CONV_STEMS[self.patch], strict=True)
        ):
            init = fan_in_uniform(kernel * kernel * x_byxc.shape[-1])
            x_byxc = nn.Conv(
                width,
                (kernel, kernel),
                strides=stride,
                padding=padding,
                dtype=self.dtype,
                kernel_init=init,
                bias_init=init,
                name=f"conv_{i}",
            )(jax.nn.relu(x_byxc) if i else x_byxc)
        return x_byxc.reshape(x_byxc.shape[0], -1, self.features)


class TokenTransformer(nn.Module):
    """Attention whose skip path is its own values, then a residual MLP of ratio 1.

    The random projection of the "performer" kind is a parameter, so that it travels with the
    weights, but it is never trained.

    Attributes:
      features: width after attention.
      kind: "t2t" (softmax) or "performer" (positive random features).
      epsilon: of the norms.
      dtype: compute dtype.
      implementation: passed to `nn.attend` (kind "t2t").
    """

    features: int = 64
    kind: str = "t2t"
    epsilon: float = 1e-5
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, t, d]` to `[b, t, features]`."""
        attend = None
        if self.kind == "performer":
            shape = (self.features // 2, self.features)
            projection = self.param("random_projection", orthogonal_projection, *shape)
            attend = functools.partial(_linear_attention, jax.lax.stop_gradient(projection))
        attention = MultiHeadAttention(
            num_heads=1,
            head_dim=self.features,
            # The reference scales by the width before the projection.
            scale=None if attend else x.shape[-1] ** -0.5,
            use_bias=self.kind == "performer",
            value_skip=True,
            dtype=self.dtype,
            implementation=self.implementation,
            attend=attend,
            name="attention",
        )
        x = attention(LayerNorm(self.epsilon, self.dtype, name="attention_norm")(x))
        normal_btd = LayerNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        return x + Mlp(self.features, dtype=self.dtype, name="mlp")(normal_btd)


class TokensToToken(nn.Module):
    """Soft splits with a token transformer after each of the first two.

    Attributes:
      features: d, the token width.
      patch: 12 or 16, the total stride.
      kind: "t2t" or "performer".
      dtype: compute dtype.
      implementation: passed to `nn.attend` (kind "t2t").
    """

    features: int
    patch: int
    kind: str = "t2t"
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """Map `image [b, y, x, c]` to `[b, p, d]`."""
        first, second, third = SOFT_SPLITS[self.patch]
        x_byxc = extract_patches(image.astype(self.dtype), *first)
        for i, split in enumerate((second, third)):
            b, rows, columns, c = x_byxc.shape
            token = TokenTransformer(
                kind=self.kind,
                dtype=self.dtype,
                implementation=self.implementation,
                name=f"token_{i}",
            )
            x_btd = token(x_byxc.reshape(b, rows * columns, c))
            x_byxc = extract_patches(x_btd.reshape(b, rows, columns, -1), *split)
        x_bpv = x_byxc.reshape(x_byxc.shape[0], -1, x_byxc.shape[-1])
        return nn.Dense(self.features, dtype=self.dtype, kernel_init=LINEAR, name="projection")(
            x_bpv
        )


def _linear_attention(projection, query, key, value, return_probabilities=False):
    out_btnh = linear_attention(query, key, value, projection)
    if not return_probabilities:
        return out_btnh
    query_btnm, key_bsnm = (positive_features(x, projection) for x in (query, key))
    weights_bnts = jnp.einsum("btnm,bsnm->bnts", query_btnm, key_bsnm)
    total_bnt1 = weights_bnts.sum(axis=-1, keepdims=True)
    return AttentionOutput(out=out_btnh, probabilities=weights_bnts / total_bnt1)
