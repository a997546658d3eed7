# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention as a module: projections around `ops.attention`, with capture."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attnjax.nn.attend import attend
from attnjax.nn.initializers import LINEAR
from attnjax.ops import attention
from attnjax.parallel.constrain import constrain
from attnjax.typing import Array

CAPTURE = "attention"
"""Collection that receives probabilities: pass `mutable=["attention"]` to `apply`."""


class Projection(nn.Module):
    """Kernel and bias of a linear map between model width and heads, in the compute dtype."""

    kernel_shape: tuple
    bias_shape: tuple | None
    dtype: str = "float32"
    kernel_init: Callable[..., Array] = LINEAR

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, self.kernel_shape, jnp.float32)
        if self.bias_shape is None:
            return kernel.astype(self.dtype), None
        bias = self.param("bias", nn.initializers.zeros, self.bias_shape, jnp.float32)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class MultiHeadAttention(nn.Module):
    """Attention with separate query, key, value and output kernels.

    out = concat_n(softmax(q_n k_n^T scale) v_n) W_out, self-attention unless a context is given.

    When the collection "attention" is mutable, the probabilities `[b,n,t,s]` (float32) of this call
    are sown there; otherwise they need not exist.

    Attributes:
      num_heads: n; divides the model width unless `head_dim` is given.
      head_dim: h; by default model width / num_heads.
      scale: factor on the scores; by default h ** -0.5.
      use_bias: biases on query, key and value (the output projection always has one).
      value_skip: add the values to the output projection's result instead of the caller's residual
        (token transformers, whose width differs between input and output).
      dropout: rate on the probabilities while training.
      dtype: compute dtype.
      implementation: passed to `nn.attend`.
      attend: replaces `ops.attention`; called as `attend(query, key, value, **options)` with only
        those options of `ops.attention` that this call uses.
      kernel_init: draws the kernels `[d, n, h]` of query, key and value.
      out_init: draws the kernel `[n, h, d]` of the output.
    """

    num_heads: int
    head_dim: int | None = None
    scale: float | None = None
    use_bias: bool = True
    value_skip: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    implementation: str | None = None
    attend: Callable[..., Any] | None = None
    kernel_init: Callable[..., Array] = LINEAR
    out_init: Callable[..., Array] = LINEAR

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        *,
        mask: Array | None = None,
        bias: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Attend from `x` to `context`.

        Args:
          x: `[b, t, d]` queries.
          context: `[b, s, d]` keys and values; `x` itself when None.
          mask: bool, broadcastable to `[b, n, t, s]`, True where attention is allowed.
          bias: broadcastable to `[b, n, t, s]`, added to the scaled scores.
          train: apply dropout, with the "dropout" key.

        Returns:
          `[b, t, d]`, or `[b, t, n * h]` with `value_skip`.

        Raises:
          ValueError: `num_heads` does not divide the width and no `head_dim` is given.
        """
        n, width = self.num_heads, x.shape[-1]
        if self.head_dim is None and width % n:
            raise ValueError(f"num_heads={n} does not divide the width {width}")
        h = self.head_dim or width // n
        x_btd = x.astype(self.dtype)
        context_bsd = x_btd if context is None else context.astype(self.dtype)
        bias_shape = (n, h) if self.use_bias else None
        out_width = n * h if self.value_skip else width
        s_width = context_bsd.shape[-1]

        def project(name, width):
            shape = (width, n, h)
            return Projection(shape, bias_shape, self.dtype, self.kernel_init, name=name)()

        w_query, b_query = project("query", width)
        w_key, b_key = project("key", s_width)
        w_value, b_value = project("value", s_width)
        w_out, b_out = Projection(
            (n, h, out_width), (out_width,), self.dtype, self.out_init, name="out"
        )()

        options: dict[str, Any] = {}
        for name, value in (("mask", mask), ("bias", bias)):
            if value is not None:
                options[name] = value
        if train and self.dropout:
            options |= dict(dropout_rate=self.dropout, dropout_key=self.make_rng("dropout"))
        capture = self.is_mutable_collection(CAPTURE) and not self.is_initializing()
        if capture:
            options["return_probabilities"] = True
        if self.attend is None or self.scale is not None:
            options["scale"] = self.scale or h**-0.5

        query_btnh = _project(x_btd, w_query, b_query)
        single_query = x.shape[1] == 1 and context is not None and not self.value_skip
        if single_query and not options.keys() & {"mask", "dropout_rate"} and self.attend is None:
            out_btnh, result = _attend_once(
                query_btnh, context_bsd, w_key, w_value, b_value, options
            )
        else:
            key_bsnh = _project(context_bsd, w_key, b_key)
            value_bsnh = _project(context_bsd, w_value, b_value)
            if self.attend is not None:
                result = self.attend(query_btnh, key_bsnh, value_bsnh, **options)
            else:
                result = attend(
                    query_btnh, key_bsnh, value_bsnh, implementation=self.implementation, **options
                )
            out_btnh = result.out if capture else result
        if capture:
            self.sow(CAPTURE, "probabilities", result.probabilities)
        out_btd = jnp.einsum("btnh,nhd->btd", out_btnh, w_out) + b_out
        if self.value_skip:
            out_btd = out_btd + value_bsnh.reshape(out_btd.shape)
        return out_btd


def _project(x_btd, kernel_dnh, bias_nh):
    projected_btnh = jnp.einsum("btd,dnh->btnh", x_btd, kernel_dnh)
    if bias_nh is not None:
        projected_btnh = projected_btnh + bias_nh
    return constrain(projected_btnh, "batch", "sequence", "heads", None)


def _attend_once(query_btnh, context_bsd, w_key, w_value, b_value, options):
    """Attend with one query per head without projecting the context.

    q . (W_k c) = (W_k^T q) . c and sum_s p_s (W_v c_s + b) = W_v (sum_s p_s c_s) + b, so that the
    context serves as one shared key and value head of width d: O(s n d) instead of O(s d^2). The
    key bias adds the same to all scores of a head and drops out of the softmax.
    """
    query_btnd = jnp.einsum("btnh,dnh->btnd", query_btnh, w_key)
    shared_bskd = context_bsd[:, :, None, :]
    # One row of scores per head is small enough to materialise on every platform.
    result = attention(query_btnd, shared_bskd, shared_bskd, implementation="reference", **options)
    mixed_btnd = result.out if "return_probabilities" in options else result
    out_btnh = jnp.einsum("btnd,dnh->btnh", mixed_btnd, w_value)
    return (out_btnh if b_value is None else out_btnh + b_value), result
