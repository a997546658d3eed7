# SPDX-License-Identifier: Apache-2.0
"""Diagonal state spaces (S4D): a convolution whose kernel is a sum of decaying oscillations.

    x_t = exp(dt A) x_(t-1) + B u_t,  y_t = 2 Re(C x_t) + D u_t,   A_n = -1/2 + i pi n
    kernel_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l)

Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", arXiv
2206.11893 (B folded into C). As a mixer M is the Toeplitz matrix of that kernel, W^c [paper
symbol], one for each head [our design]; a bidirectional one adds a second kernel, transposed.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.mixers.convolution import convolution_flops, convolve, toeplitz
from attnjax.ops.mixers.template import Mixer, check_positive
from attnjax.typing import Array, Params, PRNGKey

INITS = ("linear", "inverse")
"""Frequencies at initialisation: pi n, or (N / pi) (N / (1 + 2 n) - 1) for N = 2 x states."""


def s4d_init(
    key: PRNGKey, channels: int, states: int, *, init: str = "linear",
    dt_range: tuple[float, float] = (1e-3, 1e-1), kernels: int | None = None,
    is_shared: bool = False,
) -> Params:  # fmt: skip
    """Draw the parameters of one kernel, or of several, for each channel.

    Args:
      key: typed random key.
      channels: c.
      states: complex numbers of state n (each stands for itself and its conjugate).
      init: one of `INITS`.
      dt_range: bounds of the step sizes, log-uniform.
      kernels: m kernels for each channel, which differ in C; None: one, without an axis.
      is_shared: all channels share A, and C is drawn together with a B of random entries for which
        the response to a constant input has variance 1.

    Returns:
      `log_dt [c]`, `log_decay [c,n]` (log of -Re A), `frequency [c,n]` (Im A), `output [m,c,n,2]`
      (real and imaginary part of C), `skip [m,c]` (D); float32. If A is shared, c is 1 in it.

    Raises:
      ValueError: the initialisation is unknown.
    """
    if init not in INITS:
        raise ValueError(f"init {init!r} is unknown; choose from {', '.join(INITS)}")
    dt_key, output_key, skip_key = jax.random.split(key, 3)
    low, high = (math.log(x) for x in dt_range)
    n = jnp.arange(states, dtype=jnp.float32)
    frequency = math.pi * n
    if init == "inverse":
        frequency = (2 * states / math.pi) * (2 * states / (1 + 2 * n) - 1)
    several = () if kernels is None else (kernels,)
    draw = lambda key, *shape: jax.random.normal(key, shape) * math.sqrt(0.5)
    output = draw(output_key, *several, channels, states, 2)
    if is_shared:
        inputs_n = jax.lax.complex(*draw(jax.random.fold_in(output_key, 1), 2, states))
        response = 2 * jnp.sum(jnp.abs(inputs_n / (1j * frequency - 0.5)) ** 2)
        product = jax.lax.complex(output[..., 0], output[..., 1]) * inputs_n * response**-0.5
        output = jnp.stack([product.real, product.imag], axis=-1)
    rates = (1 if is_shared else channels, states)
    return {
        "log_dt": jax.random.uniform(dt_key, (channels,), minval=low, maxval=high),
        "log_decay": jnp.full(rates, math.log(0.5)),
        "frequency": jnp.broadcast_to(frequency, rates),
        "output": output,
        "skip": jax.random.normal(skip_key, (*several, channels)),
    }


def s4d_kernel(params: Params, length: int) -> Array:
    """Return the kernels `[m,c,length]` float32 of `s4d_init`'s parameters, without D."""
    rate_cn, output_cn = _discrete(params)
    # exp(rate (i size + j)) is a product, so that no table of all powers is needed.
    blocks, size = _blocks(length)
    starts_cni = output_cn[..., None] * jnp.exp(rate_cn[..., None] * (size * jnp.arange(blocks)))
    offsets_cnj = jnp.exp(rate_cn[..., None] * jnp.arange(size))
    # The real part of a complex product as one real product.
    starts_cni = jnp.concatenate([starts_cni.real, -starts_cni.imag], axis=-2)
    offsets_cnj = jnp.concatenate([offsets_cnj.real, offsets_cnj.imag], axis=-2)
    kernel_cij = jnp.einsum("...cni,cnj->...cij", starts_cni, offsets_cnj, precision="highest")
    return 2 * kernel_cij.reshape(*kernel_cij.shape[:-2], blocks * size)[..., :length]


def s4d_kernel_flops(kernels: int, states: int, length: int) -> float:
    """Count the matrix products of `s4d_kernel`; a multiply-add is two."""
    blocks, size = _blocks(length)
    return 4.0 * kernels * states * blocks * size


def s4d_step(params: Params, state: Array, x: Array) -> tuple[Array, Array]:
    """Advance the recurrence by one input.

    Args:
      params: from `s4d_init`, c channels.
      state: complex64 `[b,c,h,n]`, zeros at the start.
      x: `[b,c,h]` float32, h inputs for each channel.

    Returns:
      The new state and the output `[b,c,h]` float32, or `[b,m,c,h]`, D included.
    """
    rate_cn, output_cn = _discrete(params)
    state = jnp.exp(rate_cn)[None, :, None] * state + x[..., None]
    out_bch = 2 * jnp.real(jnp.einsum("bchn,...cn->b...ch", state, output_cn, precision="highest"))
    x = x if output_cn.ndim == 2 else x[:, None]
    return state, out_bch + params["skip"][None, ..., None] * x


def _blocks(length):
    """How many blocks of which size: about the square root each."""
    size = math.isqrt(length - 1) + 1
    return -(-length // size), size


def _discrete(params):
    dt_c1 = jnp.exp(params["log_dt"])[:, None]
    a_cn = -jnp.exp(params["log_decay"]) + 1j * params["frequency"]
    output_cn = params["output"][..., 0] + 1j * params["output"][..., 1]
    return dt_c1 * a_cn, output_cn * (jnp.exp(dt_c1 * a_cn) - 1) / a_cn


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4D(Mixer):
    """A state space for each head, as a convolution by FFT.

    Attributes:
      states: complex numbers of state.
      causal: only the forward kernel; else a second one runs backwards.
      frequencies: one of `INITS`.
    """

    is_data_dependent: ClassVar[bool] = False

    states: int = 16
    causal: bool = False
    frequencies: str = "linear"

    def __post_init__(self):
        check_positive(self, "states")
        if self.frequencies not in INITS:
            raise ValueError(
                f"frequencies {self.frequencies!r} is unknown; choose from {', '.join(INITS)}"
            )

    def own_params(self, key, length, dim, heads):
        names = ("forward",) if self.causal else ("forward", "backward")
        keys = jax.random.split(key, len(names))
        draw = lambda k: s4d_init(k, heads, self.states, init=self.frequencies)
        return {name: draw(k) for name, k in zip(names, keys, strict=True)}

    def mix(self, params, x, valid=None):
        value_btnh = self.values(params, x, valid)
        mixed_btnh = convolve(value_btnh, self._kernel(params["forward"], x.shape[1]))
        if not self.causal:
            kernel_nt = self._kernel(params["backward"], x.shape[1])
            mixed_btnh += convolve(value_btnh[:, ::-1], kernel_nt)[:, ::-1]
        return mixed_btnh

    def dense_matrix(self, params, x, valid=None):
        t = x.shape[1]
        matrix_nts = toeplitz(self._kernel(params["forward"], t), t)
        if not self.causal:
            backward_nts = toeplitz(self._kernel(params["backward"], t), t)
            matrix_nts += jnp.swapaxes(backward_nts, 1, 2)
        return matrix_nts[None]

    def _kernel(self, params, length):
        return s4d_kernel(params, length).at[:, 0].add(params["skip"])

    def mixing_flops(self, length, dim, heads):
        ways = 1 if self.causal else 2
        kernels = s4d_kernel_flops(ways * heads, self.states, length)
        return ways * convolution_flops(length, dim) + kernels

    def mixing_numbers(self, length, dim, heads):
        ways = 1 if self.causal else 2
        return ways * (2.0 * length * dim + heads * length)
