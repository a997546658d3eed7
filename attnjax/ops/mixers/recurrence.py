# SPDX-License-Identifier: Apache-2.0
"""Linear recurrences: M is lower triangular and made of products of diagonal matrices.

    LRU    x_t = a x_(t-1) + g u_t, y_t = Re(c x_t):  M_ts = Re sum_n c_n g_n a_n^(t - s)
    gated  x_t = a_t x_(t-1) + (1 - a_t) u_t:         M_ts = (1 - a_s) prod_(r = s+1..t) a_r

LRU: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349,
with |a| < 1 by construction and g = sqrt(1 - |a|^2). Both run as parallel scans and are causal; one
state vector for each channel of a head, and one decay for each head, are [our design].
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.mixers.convolution import toeplitz
from attnjax.ops.mixers.template import Mixer, check_positive, masked


def diagonal_recurrence(decay, x):
    """Return h_t = decay_t h_(t-1) + x_t for all t, from h_(-1) = 0, as a parallel scan.

    Args:
      decay: broadcastable to x, with the positions on axis 1.
      x: `[b,t,...]` real or complex.

    Returns:
      `[b,t,...]`.
    """
    decay = jnp.broadcast_to(decay, x.shape)
    join = lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1])
    return jax.lax.associative_scan(join, (decay, x), axis=1)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRecurrence(Mixer):
    """LRU: decays and frequencies are learnt, and the same for all inputs.

    Attributes:
      states: complex numbers of state for each channel.
      slowest: largest |a| at initialisation; the smallest is half of it.
    """

    is_data_dependent: ClassVar[bool] = False

    states: int = 8
    slowest: float = 0.99

    def __post_init__(self):
        check_positive(self, "states")
        if not 0 < self.slowest < 1:
            raise ValueError(f"slowest={self.slowest}: must be between 0 and 1")

    @property
    def is_causal(self):
        return True

    def own_params(self, key, length, dim, heads):
        radius_key, angle_key, output_key = jax.random.split(key, 3)
        shape = (heads, self.states)
        low, high = (self.slowest / 2) ** 2, self.slowest**2
        radius = jnp.sqrt(jax.random.uniform(radius_key, shape, minval=low, maxval=high))
        output = jax.random.normal(output_key, (*shape, 2)) * self.states**-0.5
        return {
            "log_decay": jnp.log(-jnp.log(radius)),
            "angle": jax.random.uniform(angle_key, shape, maxval=math.pi / 2),
            "output": output,
        }

    def mix(self, params, x, valid=None):
        rate_nr, output_nr = self._discrete(params)
        value_btnh = self.values(params, x, valid)
        input_btnhr = jnp.broadcast_to(
            value_btnh.astype(jnp.complex64)[..., None], (*value_btnh.shape, self.states)
        )
        state_btnhr = diagonal_recurrence(jnp.exp(rate_nr)[None, None, :, None], input_btnhr)
        mixed = jnp.real(jnp.einsum("btnhr,nr->btnh", state_btnhr, output_nr))
        return mixed.astype(value_btnh.dtype)

    def dense_matrix(self, params, x, valid=None):
        rate_nr, output_nr = self._discrete(params)
        powers_nrt = jnp.exp(rate_nr[..., None] * jnp.arange(x.shape[1]))
        kernel_nt = jnp.real(jnp.einsum("nr,nrt->nt", output_nr, powers_nrt))
        return toeplitz(kernel_nt, x.shape[1])[None]

    def _discrete(self, params):
        decay_nr = jnp.exp(params["log_decay"])
        scale_nr = jnp.sqrt(-jnp.expm1(-2 * decay_nr))
        output_nr = params["output"][..., 0] + 1j * params["output"][..., 1]
        return -decay_nr + 1j * params["angle"], output_nr * scale_nr

    def mixing_flops(self, length, dim, heads):
        return 16.0 * length * dim * self.states

    def mixing_numbers(self, length, dim, heads):
        return 4.0 * length * dim * self.states

    def path_length(self, length):
        return max(1, length - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedRecurrence(Mixer):
    """A running mean whose decay a_t = sigmoid(w . x_t + b) the input decides, for each head.

    Attributes:
      memory: tokens that the mean spans at initialisation.
    """

    memory: float = 16.0

    def __post_init__(self):
        if self.memory <= 1:
            raise ValueError(f"memory={self.memory}: must be above 1 token")

    @property
    def is_causal(self):
        return True

    def own_params(self, key, length, dim, heads):
        kernel = jax.random.normal(key, (dim, heads)) * dim**-0.5
        bias = jnp.full((heads,), math.log(self.memory - 1))
        return {"decay": {"kernel": kernel, "bias": bias}}

    def mix(self, params, x, valid=None):
        keep_btn, take_btn = self._gates(params, x, valid)
        value_btnh = self.values(params, x, valid)
        input_btnh = take_btn[..., None] * value_btnh.astype(jnp.float32)
        return diagonal_recurrence(keep_btn[..., None], input_btnh).astype(value_btnh.dtype)

    def dense_matrix(self, params, x, valid=None):
        keep_btn, take_btn = self._gates(params, x, valid)
        total_bnt = jnp.moveaxis(jnp.cumsum(jnp.log(keep_btn), axis=1), 1, 2)
        decay_bnts = total_bnt[..., :, None] - total_bnt[..., None, :]
        is_past = jnp.tril(jnp.ones(decay_bnts.shape[-2:], bool))
        product_bnts = jnp.where(is_past, jnp.exp(jnp.where(is_past, decay_bnts, 0)), 0)
        return product_bnts * jnp.moveaxis(take_btn, 1, 2)[..., None, :]

    def _gates(self, params, x, valid):
        """Return a_t and 1 - a_t `[b,t,n]`; padding neither decays nor adds."""
        kernel_dn = params["decay"]["kernel"]
        logit_btn = jnp.einsum("btd,dn->btn", x.astype(jnp.float32), kernel_dn)
        logit_btn = logit_btn + params["decay"]["bias"]
        keep_btn, take_btn = jax.nn.sigmoid(logit_btn), jax.nn.sigmoid(-logit_btn)
        if valid is not None:
            keep_btn = jnp.where(valid[..., None], keep_btn, 1.0)
        return keep_btn, masked(take_btn, valid)

    def mixing_flops(self, length, dim, heads):
        return 2.0 * length * dim * heads + 6.0 * length * dim

    def mixing_numbers(self, length, dim, heads):
        return 2.0 * length * (dim + heads)

    def path_length(self, length):
        return max(1, length - 1)
