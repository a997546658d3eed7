# SPDX-License-Identifier: Apache-2.0
"""Mixing by a perceptron along the sequence: Y = W_2 gelu(W_1 X).

Tolstikhin et al., "MLP-Mixer", arXiv 2105.01601. W, a weight learnt together with an element-wise
nonlinearity, is a [paper symbol]. The nonlinearity sits between the two matrices, so that there is
no one matrix M for a head.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.mixers.template import Mixer, check_length, masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptron(Mixer):
    """Two matrices over positions, shared by all channels.

    Attributes:
      hidden: rows of W_1; 0 for half the length.
    """

    projections: ClassVar[tuple[str, ...]] = ()

    hidden: int = 0

    def own_params(self, key, length, dim, heads):
        up_key, down_key = jax.random.split(key)
        f = self._hidden(length)
        return {
            "first": jax.random.normal(up_key, (f, length), jnp.float32) * length**-0.5,
            "second": jax.random.normal(down_key, (length, f), jnp.float32) * f**-0.5,
            "first_bias": jnp.zeros((f,)),
            "second_bias": jnp.zeros((length,)),
        }

    def values(self, params, x, valid=None):
        return masked(x, valid)[:, :, None, :]

    def mix(self, params, x, valid=None):
        check_length(x, params["first"].shape[1], self)
        first, second, first_bias, second_bias = (
            params[k].astype(x.dtype) for k in ("first", "second", "first_bias", "second_bias")
        )
        value_bsnh = self.values(params, x, valid)
        hidden = jnp.einsum("fs,bsnh->bfnh", first, value_bsnh) + first_bias[:, None, None]
        hidden = jax.nn.gelu(hidden)
        return jnp.einsum("tf,bfnh->btnh", second, hidden) + second_bias[:, None, None]

    def dense_matrix(self, params, x, valid=None):
        return None

    def finish(self, params, mixed):
        return mixed[:, :, 0]

    def _hidden(self, length):
        return self.hidden or max(1, length // 2)

    def mixing_flops(self, length, dim, heads):
        return 4.0 * length * self._hidden(length) * dim

    def mixing_numbers(self, length, dim, heads):
        return 2.0 * self._hidden(length) * dim
