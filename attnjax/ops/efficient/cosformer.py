# SPDX-License-Identifier: Apache-2.0
"""cosFormer: linear attention whose weights fall off with distance as a cosine does.

    out_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 M))

Qin et al., "cosFormer: Rethinking Softmax in Attention", arXiv 2202.08791, Eq. 10 to 12; M is the
longer of both lengths. The causal form of the paper's code is not served, as in CAB (arXiv
2210.07661): with M each weight would know how long the sequence is going to be.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PatternAttention
from attnjax.ops.linear import cosine_weighted, feature_attention
from attnjax.ops.mixers.template import masked

FLOOR = 1e-6
"""Smallest denominator, as released: queries without a positive entry attend to nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosformer(PatternAttention):
    """Linear attention with rectified queries and keys, weighted by distance.

    Attributes:
      compat: as released: padded keys are attended to, and padding counts in M.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"noncausal_self", "noncausal_cross"})

    compat: bool = False

    def attend(
        self, params, query, key, value, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        del params, rng, train, core
        if self.compat:
            query_valid = key_valid = None
        places = [_places(x, valid) for x, valid in ((query, query_valid), (key, key_valid))]
        span_b = jnp.maximum(places[0][:, -1], places[1][:, -1]).clip(1)
        query_btnm, key_bsnm = (
            cosine_weighted(jax.nn.relu(x), span_b, p)
            for x, p in zip((query, key), places, strict=True)
        )
        key_bsnm = masked(key_bsnm, key_valid)
        out = feature_attention(query_btnm, key_bsnm, value, epsilon=0.0, floor=FLOOR)
        return out.astype(query.dtype)

    def attend_flops(self, length, context_length, dim, heads):
        # Features are twice as wide as heads: one by sine, one by cosine.
        return 4.0 * dim * (dim // heads) * (length + context_length) + 4.0 * length * dim


def _places(x_btnh, valid_bt):
    """Count the valid tokens up to each one, int32 `[b,t]`."""
    if valid_bt is None:
        return jnp.arange(1, x_btnh.shape[1] + 1, dtype=jnp.int32)[None]
    return jnp.cumsum(valid_bt, axis=1, dtype=jnp.int32)
