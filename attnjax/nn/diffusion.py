# SPDX-License-Identifier: Apache-2.0
"""Blocks of networks that denoise pictures: noise-level vectors, residual blocks, other sizes.

They follow Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, Appendix B, as
the public code of SR3 (arXiv 2104.07636) has them.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnjax.nn.norm import GroupNorm
from attnjax.nn.pattern_attention import Attention
from attnjax.ops.efficient import PatternAttention
from attnjax.ops.positions import sinusoids
from attnjax.parallel.constrain import constrain
from attnjax.typing import Array

ORTHOGONAL = nn.initializers.orthogonal()
"""Orthogonal over all inputs of an output, as SR3's code draws convolutions and linear maps."""


class LevelEmbed(nn.Module):
    """A number per example (noise level, time) as a vector: sinusoids, linear, swish, linear.

    Attributes:
      features: width of the vector.
      hidden: width in the middle.
      kernel_init: draws both matrices.
      dtype: compute dtype of the linear maps.
      waves: width of the sinusoids, even; None: that of the vector.
      is_cosine_first: cosines before sines.
    """

    features: int
    hidden: int
    kernel_init: Callable[..., Array] = ORTHOGONAL
    dtype: str = "float32"
    waves: int | None = None
    is_cosine_first: bool = False

    @nn.compact
    def __call__(self, level: Array) -> Array:
        """Map `level [b]` to `[b, features]`."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        width = self.waves or self.features
        waves_bd = sinusoids(level, width, layout="half")
        if self.is_cosine_first:
            waves_bd = jnp.roll(waves_bd, width // 2, axis=-1)
        hidden_bf = jax.nn.swish(dense(self.hidden, name="up")(waves_bd))
        return dense(self.features, name="down")(hidden_bf)


class ResidualBlock(nn.Module):
    """Two convolutions behind norms, a vector per example between them, and a skip path.

    h = conv(swish(norm(x)));   h <- h + W e,  or  (1 + W e) h + W' e
    y = skip(x) + conv(drop(swish(norm(h))))

    The skip path is a 1 x 1 convolution where the number of channels changes.

    Attributes:
      features: channels of the output.
      groups: of the norms.
      dropout: rate before the second convolution while training.
      has_scale: the vector scales channels, too.
      kernel_init: draws all kernels.
      dtype: compute dtype.
    """

    features: int
    groups: int = 32
    dropout: float = 0.0
    has_scale: bool = False
    kernel_init: Callable[..., Array] = ORTHOGONAL
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, vector: Array | None = None, train: bool = False) -> Array:
        """Map pictures to pictures of the same size.

        Args:
          x: `[b, y, x, c]`.
          vector: `[b, d]`, such as from `LevelEmbed`; None: nothing is added.
          train: with dropout; positional for `nn.remat`.

        Returns:
          `[b, y, x, features]`.
        """
        conv = functools.partial(
            nn.Conv, self.features, dtype=self.dtype, kernel_init=self.kernel_init
        )
        norm = functools.partial(GroupNorm, self.groups, dtype=self.dtype)
        h_byxc = conv((3, 3), padding=1, name="first")(jax.nn.swish(norm(name="first_norm")(x)))
        if vector is not None:
            width = self.features * (2 if self.has_scale else 1)
            dense = nn.Dense(width, dtype=self.dtype, kernel_init=self.kernel_init, name="vector")
            shift_byxc = dense(vector)[:, None, None]
            if self.has_scale:
                scale_byxc, shift_byxc = jnp.split(shift_byxc, 2, axis=-1)
                h_byxc = h_byxc * (1 + scale_byxc)
            h_byxc = h_byxc + shift_byxc
        h_byxc = jax.nn.swish(norm(name="second_norm")(h_byxc))
        h_byxc = nn.Dropout(self.dropout, deterministic=not train)(h_byxc)
        h_byxc = conv((3, 3), padding=1, name="second")(h_byxc)
        if x.shape[-1] != self.features:
            x = conv((1, 1), name="skip")(x)
        return constrain(x + h_byxc, "batch", None, None, None)

    def flops(self, side: int, channels: int, vector: int = 0) -> float:
        """Count operations for one picture of `side` x `side` with these channels and vector."""
        kernels = 9 * (channels + self.features) + (channels if channels != self.features else 0)
        width = self.features * (2 if self.has_scale else 1)
        return 2.0 * (side * side * kernels * self.features + vector * width)


class PictureAttention(nn.Module):
    """x + attention(norm(x)), tokens being the pixels of a picture row by row.

    Attributes:
      attention: what attends, in the pattern noncausal_self.
      num_heads: heads; divides the channels.
      groups: of the norm.
      kernel_init: draws the matrices of the projections.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
    """

    attention: PatternAttention
    num_heads: int = 1
    groups: int = 32
    kernel_init: Callable[..., Array] = ORTHOGONAL
    dtype: str = "float32"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Map `x [b, y, x, c]` to the same shape; `train` is positional for `nn.remat`."""
        b, rows, columns, c = x.shape
        tokens_bpc = GroupNorm(self.groups, dtype=self.dtype, name="norm")(x)
        tokens_bpc = constrain(tokens_bpc.reshape(b, rows * columns, c), "batch", "sequence", None)
        attend = Attention(
            self.attention, self.num_heads, kernel_init=self.kernel_init, dtype=self.dtype,
            implementation=self.implementation, name="attention",
        )  # fmt: skip
        branch_byxc = attend(tokens_bpc, train=train).reshape(x.shape)
        # Pixels that devices have shared for attention come together again before convolutions:
        # XLA computes wrong ones of divided pictures with kernels divided over the same devices.
        return x + constrain(branch_byxc, "batch", None, None, None)


class Downsample(nn.Module):
    """Halve the sides of a picture by a convolution with stride 2.

    Attributes:
      kernel_init: draws the kernel.
      dtype: compute dtype.
    """

    kernel_init: Callable[..., Array] = ORTHOGONAL
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, y, x, c]` to `[b, y / 2, x / 2, c]`; odd sides are rounded up."""
        conv = nn.Conv(
            x.shape[-1], (3, 3), strides=2, padding=1, dtype=self.dtype,
            kernel_init=self.kernel_init, name="conv",
        )  # fmt: skip
        return conv(x)


class Upsample(nn.Module):
    """Double the sides of a picture by repeating pixels, then convolve.

    Attributes:
      kernel_init: draws the kernel.
      dtype: compute dtype.
    """

    kernel_init: Callable[..., Array] = ORTHOGONAL
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `x [b, y, x, c]` to `[b, 2 y, 2 x, c]`."""
        b, rows, columns, c = x.shape
        repeated_byxc = jnp.broadcast_to(x[:, :, None, :, None], (b, rows, 2, columns, 2, c))
        conv = nn.Conv(
            c, (3, 3), padding=1, dtype=self.dtype, kernel_init=self.kernel_init, name="conv"
        )
        return conv(repeated_byxc.reshape(b, 2 * rows, 2 * columns, c))
