# SPDX-License-Identifier: Apache-2.0
"""S4D as an attention: state spaces for every channel and head, GELU, and a linear map.

    y_m = K_m * x + D_m x,  K_m of `ops.mixers.state_space`;    out = gelu(concat_m y_m) W_out + b

Every head has a kernel for every channel of the model; channels share A, heads share dt. Both ways
in time (noncausal), a second kernel runs backwards from the next token on:

    y_t = sum_(l>=0) K_l x_(t-l) + sum_(l>=0) K'_l x_(t+1+l) + D x_t

Gu et al., arXiv 2206.11893, as CAB (arXiv 2210.07661) uses it. There are no queries and keys: of
the released interface only the queries are read. As released, padding is read like any other token
and the noncausal form looks backwards only unless it is told to be bidirectional (`compat`).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PatternAttention, Stream, check_heads
from attnjax.ops.mixers.convolution import convolve
from attnjax.ops.mixers.state_space import s4d_init, s4d_kernel, s4d_kernel_flops, s4d_step
from attnjax.ops.mixers.template import check_positive, masked

_OUT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4D(PatternAttention):
    """Diagonal state spaces in place of attention; parameters as in `init`.

    Attributes:
      states: complex numbers of state, half of the N of the paper.
      bidirectional: look both ways; None: where no pattern forbids it (with `compat`: never).
      compat: as released: padding is read, and see `bidirectional`.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"noncausal_self", "causal_self"})
    rotates: ClassVar[bool] = False

    states: int = 8
    bidirectional: bool | None = None
    compat: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "states")
        if self.causal and self.bidirectional:
            raise ValueError("bidirectional=True: the causal form cannot look ahead")

    @property
    def looks_ahead(self) -> bool:
        """Whether there are kernels that run backwards in time."""
        if self.bidirectional is None:
            return not (self.causal or self.compat)
        return self.bidirectional

    def init(self, key, dim, heads, *, context_dim=None, kernel_init=None):
        """Return new parameters; see `PatternAttention.init`.

        Returns:
          What `ops.mixers.state_space.s4d_init` returns, with `skip [n,d]` and
          `output [n,d,states,2]` (twice as many heads if kernels run both ways, the backward ones
          last), and `out` with `kernel [n,d,d]` and `bias [d]`.
        """
        del context_dim
        check_heads(dim, heads)
        own_key, out_key = jax.random.split(key)
        ways = 2 if self.looks_ahead else 1
        params = s4d_init(
            own_key, dim, self.states, init="inverse", kernels=ways * heads, is_shared=True
        )
        params["skip"] = params["skip"][:heads]
        kernel = (kernel_init or _OUT)(out_key, (heads * dim, dim), jnp.float32)
        params["out"] = {"kernel": kernel.reshape(heads, dim, dim), "bias": jnp.zeros(dim)}
        return params

    def apply(
        self, params, x, context=None, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        self._check_context(context)
        del rng, train, core
        valid = query_valid if key_valid is None else key_valid
        x_btd = masked(x, None if self.compat else valid)
        kernel_ndl, first = self._kernel(params, x.shape[1])
        mixed_btndh = convolve(x_btd[..., None], kernel_ndl, first=first)
        return self._finish(params, mixed_btndh[..., 0])

    def _kernel(self, params, length):
        """Return the kernels of all heads, D included, and the offset of their first entry."""
        heads = params["skip"].shape[0]
        kernel_ndl = s4d_kernel(params, length)
        ahead_ndl, kernel_ndl = kernel_ndl[heads:], kernel_ndl[:heads]
        kernel_ndl = kernel_ndl.at[..., 0].add(params["skip"])
        if not self.looks_ahead:
            return kernel_ndl, 0
        return jnp.concatenate([ahead_ndl[..., ::-1], kernel_ndl], axis=-1), -length

    def _finish(self, params, mixed_btnd):
        hidden_btnd = jax.nn.gelu(mixed_btnd, approximate=False)
        kernel_nde, bias_e = (
            params["out"][part].astype(hidden_btnd.dtype) for part in ("kernel", "bias")
        )
        return jnp.einsum("btnd,nde->bte", hidden_btnd, kernel_nde) + bias_e

    def empty_state(self, batch, heads, width, capacity, dtype):
        """Return zeros, complex64 `[b,d,1,states]`: all heads read one state."""
        del capacity, dtype
        return jnp.zeros((batch, heads * width, 1, self.states), jnp.complex64)

    def step(self, params, x, stream):
        self._need("causal_self", "decodes step by step")
        x_bdh = jnp.swapaxes(x, 1, 2).astype(jnp.float32)
        state, mixed_bndh = s4d_step(params, stream.state, x_bdh)
        mixed_btnd = jnp.moveaxis(mixed_bndh, -1, 1).astype(x.dtype)
        return self._finish(params, mixed_btnd), Stream(stream.position + 1, state)

    def flops(self, length, context_length, dim, heads):
        del context_length
        ways = 2 if self.looks_ahead else 1
        kernels = s4d_kernel_flops(ways * heads * dim, self.states, length)
        out = 2.0 * length * heads * dim * dim
        return kernels + out + self.transform_flops(length, dim, heads)

    def transform_flops(self, length: int, dim: int, heads: int) -> float:
        """Count the operations of the Fourier transforms, of twice the length, and between them."""
        transforms = dim * (1 + 2 * heads)
        return 2.5 * 2 * length * math.log2(2 * length) * transforms + 6.0 * length * heads * dim
