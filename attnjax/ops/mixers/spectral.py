# SPDX-License-Identifier: Apache-2.0
"""Mixing in the frequency domain: the Fourier matrix itself, and learnt gates on frequencies.

    FNet  Y = Re(F^s X F^h),  F_jk = exp(-2 pi i j k / n), unnormalised      [paper symbols]
    GFNet M = F^-1 diag(w) F (Rao et al., arXiv 2107.00645)
    AFNO  F^-1 MLP(F X) (Guibas et al., arXiv 2111.13587)

All of them are circular, so there is no causal form, and padding must be zero before the transform.
[our design]: GFNet has one filter for each head instead of each channel (heads = width gives that),
so that M has one matrix for each head; AFNO shrinks softly, as its paper does.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.mixers.template import Mixer, check_length, masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fourier(Mixer):
    """FNet: nothing is learnt. V = X F^h and M = F^s are complex, phi takes the real part."""

    is_data_dependent: ClassVar[bool] = False
    projections: ClassVar[tuple[str, ...]] = ()

    def values(self, params, x, valid=None):
        return jnp.fft.fft(masked(x, valid).astype(jnp.float32), axis=-1)[:, :, None, :]

    def mix(self, params, x, valid=None):
        return jnp.fft.fft(self.values(params, x, valid), axis=1)

    def dense_matrix(self, params, x, valid=None):
        t = x.shape[1]
        # Reduced modulo t before the exponential: large angles have no digits left.
        turns = (np.arange(t)[:, None] * np.arange(t)[None, :]) % t / t
        return jnp.asarray(np.exp(-2j * np.pi * turns), jnp.complex64)[None, None]

    def finish(self, params, mixed):
        return jnp.real(mixed[:, :, 0])

    def mixing_flops(self, length, dim, heads):
        return 5.0 * length * dim * (_log2(length) + _log2(dim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralGate(Mixer):
    """GFNet: every frequency of the sequence is multiplied by a learnt complex number."""

    is_data_dependent: ClassVar[bool] = False

    def own_params(self, key, length, dim, heads):
        shape = (heads, length // 2 + 1, 2)
        noise = 0.02 * jax.random.normal(key, shape, jnp.float32)
        return {"gate": noise.at[..., 0].add(1.0)}

    def mix(self, params, x, valid=None):
        t = self._check(params, x)
        value_btnh = self.values(params, x, valid)
        gate_fn1 = _complex(params["gate"]).T[..., None]
        spectrum = jnp.fft.rfft(value_btnh.astype(jnp.float32), axis=1) * gate_fn1
        return jnp.fft.irfft(spectrum, n=t, axis=1).astype(value_btnh.dtype)

    def dense_matrix(self, params, x, valid=None):
        t = self._check(params, x)
        kernel_nt = jnp.fft.irfft(_complex(params["gate"]), n=t, axis=-1)
        return kernel_nt[:, (np.arange(t)[:, None] - np.arange(t)[None, :]) % t][None]

    def _check(self, params, x):
        t, frequencies = x.shape[1], params["gate"].shape[1]
        if t // 2 + 1 != frequencies:
            check_length(x, 2 * frequencies - 2, self)
        return t

    def mixing_flops(self, length, dim, heads):
        return 5.0 * length * dim * _log2(length) + 3.0 * length * dim

    def mixing_numbers(self, length, dim, heads):
        return length * dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveFourier(Mixer):
    """AFNO: one two-layer MLP acts on the heads of every frequency; it has no matrix.

    Attributes:
      threshold: of the soft shrinkage of frequencies.
    """

    projections: ClassVar[tuple[str, ...]] = ()

    threshold: float = 0.01

    def own_params(self, key, length, dim, heads):
        h = dim // heads
        draws = 0.02 * jax.random.normal(key, (2, heads, h, h, 2), jnp.float32)
        unit = jnp.eye(h, dtype=jnp.float32)
        return {
            "first": draws[0].at[..., 0].add(unit),
            "second": draws[1].at[..., 0].add(unit),
            "first_bias": jnp.zeros((heads, h, 2)),
            "second_bias": jnp.zeros((heads, h, 2)),
        }

    def values(self, params, x, valid=None):
        heads = params["first"].shape[0]
        return masked(x, valid).reshape(*x.shape[:2], heads, -1)

    def mix(self, params, x, valid=None):
        value_btnh = self.values(params, x, valid).astype(jnp.float32)
        spectrum = jnp.fft.rfft(value_btnh, axis=1, norm="ortho")
        first, second, first_bias, second_bias = (
            _complex(params[k]) for k in ("first", "second", "first_bias", "second_bias")
        )
        hidden = jnp.einsum("bfnh,nhk->bfnk", spectrum, first) + first_bias
        hidden = jax.nn.relu(hidden.real) + 1j * jax.nn.relu(hidden.imag)
        spectrum = jnp.einsum("bfnh,nhk->bfnk", hidden, second) + second_bias
        shrink = lambda z: jnp.sign(z) * jax.nn.relu(jnp.abs(z) - self.threshold)
        spectrum = shrink(spectrum.real) + 1j * shrink(spectrum.imag)
        return jnp.fft.irfft(spectrum, n=x.shape[1], axis=1, norm="ortho")

    def dense_matrix(self, params, x, valid=None):
        return None

    def finish(self, params, mixed):
        return mixed.reshape(*mixed.shape[:2], -1)

    def mixing_flops(self, length, dim, heads):
        # A product of complex numbers is four multiply-adds; half of the frequencies are kept.
        return 5.0 * length * dim * _log2(length) + 8.0 * length * dim * (dim // heads)

    def mixing_numbers(self, length, dim, heads):
        return 3.0 * length * dim


def _complex(pair):
    return pair[..., 0] + 1j * pair[..., 1]


def _log2(size):
    return math.log2(max(2, size))
