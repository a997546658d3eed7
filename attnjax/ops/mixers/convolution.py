# SPDX-License-Identifier: Apache-2.0
"""Convolution over positions: M is a Toeplitz matrix, W^c [paper symbol], for each head.

    y_t = sum_o w_o x_(t - o)

The kernel is short, or as long as the sequence and applied by FFT. Padding by zeros, circular form
and centring are [our design].
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.mixers.template import Mixer
from attnjax.typing import Array

DIRECT = 16
"""Longest kernel that is applied by shifting instead of FFT."""


def convolve(x: Array, kernel: Array, *, first: int = 0, is_circular: bool = False) -> Array:
    """Convolve along positions, each head with its own kernel: y_t = sum_i w_i x_(t - first - i).

    Args:
      x: `[b,t,n,h]`.
      kernel: w, `[n,k]`; or `[m,n,k]`, m kernels for each head.
      first: offset of w_0; 0 for a causal kernel, -(k // 2) for a centred one.
      is_circular: positions wrap around instead of being zero outside; k is at most t.

    Returns:
      `[b,t,n,h]`, or `[b,t,m,n,h]`, in the dtype of x, computed in float32 or wider.

    Raises:
      ValueError: a circular kernel is longer than the sequence.
    """
    t, k = x.shape[1], kernel.shape[-1]
    if is_circular and k > t:
        raise ValueError(f"a circular kernel of {k} is longer than the sequence of {t}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide, kernel = x.astype(dtype), kernel.astype(dtype)
    wide = wide if kernel.ndim == 2 else wide[:, :, None]
    if k <= DIRECT:
        out = _by_shifts(wide, kernel, first, is_circular)
    else:
        out = _by_fft(wide, kernel, first, is_circular)
    return out.astype(x.dtype)


def _by_shifts(x, kernel, first, is_circular):
    t, k = x.shape[1], kernel.shape[-1]
    if is_circular:
        shifted = lambda offset: jnp.roll(x, offset, axis=1)
    else:
        reach = max(abs(first), abs(first + k - 1))
        padded = jnp.pad(x, ((0, 0), (reach, reach)) + ((0, 0),) * (x.ndim - 2))
        shifted = lambda offset: padded[:, reach - offset : reach - offset + t]
    return sum(kernel[..., i, None] * shifted(first + i) for i in range(k))


def _by_fft(x, kernel, first, is_circular):
    t, k = x.shape[1], kernel.shape[-1]
    # Whatever wraps around lands where nobody looks.
    size = t if is_circular else max(t + k + min(first, 0), t + abs(first), k)
    spectrum = jnp.fft.rfft(x, n=size, axis=1)
    weights = jnp.moveaxis(jnp.fft.rfft(kernel, n=size, axis=-1), -1, 0)
    out = jnp.fft.irfft(spectrum * weights[None, ..., None], n=size, axis=1)
    return jnp.roll(out, first, axis=1)[:, :t]


def toeplitz(kernel: Array, length: int, *, first: int = 0, is_circular: bool = False) -> Array:
    """Return the matrix of `convolve`: constant diagonals.

    Args:
      kernel: `[n,k]`.
      length: t.
      first: see `convolve`.
      is_circular: see `convolve`.

    Returns:
      `[n,t,t]`, zero where the kernel does not reach.
    """
    index_ts = np.arange(length)[:, None] - np.arange(length)[None, :] - first
    if is_circular:
        index_ts %= length
    inside_ts = (index_ts >= 0) & (index_ts < kernel.shape[1])
    return jnp.where(inside_ts, kernel[:, np.where(inside_ts, index_ts, 0)], 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(Mixer):
    """A learnt kernel for each head.

    Attributes:
      kernel: length of the kernel; 0 for that of the sequence at `init`.
      causal: the kernel reaches backwards only; else it is centred.
      circular: positions wrap around (not together with `causal`).
    """

    is_data_dependent: ClassVar[bool] = False

    kernel: int = 0
    causal: bool = False
    circular: bool = False

    def __post_init__(self):
        if self.kernel < 0:
            raise ValueError(f"kernel={self.kernel}: must be at least 1, or 0 for the whole length")
        if self.causal and self.circular:
            raise ValueError("circular=True wraps late positions around: it cannot be causal")

    def own_params(self, key, length, dim, heads):
        k = self.kernel or length
        if self.circular and k > length:
            raise ValueError(f"kernel={k}: a circular one is at most as long as {length} tokens")
        return {"filter": jax.random.normal(key, (heads, k), jnp.float32) * k**-0.5}

    def mix(self, params, x, valid=None):
        value_btnh = self.values(params, x, valid)
        return convolve(value_btnh, params["filter"], **self._options(params))

    def dense_matrix(self, params, x, valid=None):
        return toeplitz(params["filter"], x.shape[1], **self._options(params))[None]

    def _options(self, params):
        first = 0 if self.causal else -(params["filter"].shape[1] // 2)
        return {"first": first, "is_circular": self.circular}

    def mixing_flops(self, length, dim, heads):
        k = self.kernel or length
        if k <= DIRECT:
            return 2.0 * length * k * dim
        return convolution_flops(length, dim)

    def mixing_numbers(self, length, dim, heads):
        return 0.0 if (self.kernel or length) <= DIRECT else 2.0 * length * dim

    def path_length(self, length):
        k = self.kernel or length
        reach = k - 1 if self.causal else k - 1 - k // 2
        if self.circular:
            reach = k - 1
        if reach == 0:
            return 1 if length <= 1 else None
        return max(1, math.ceil((length - 1) / reach))


def convolution_flops(length: int, dim: int) -> float:
    """Count the operations of a convolution of all channels by FFT of twice the length."""
    return 2 * 2.5 * (2 * length) * dim * math.log2(2 * length) + 6.0 * length * dim
