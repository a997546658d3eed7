# SPDX-License-Identifier: Apache-2.0
"""Performer: softmax attention by positive random features (FAVOR+).

    phi(x)_r = exp(w_r . x' - |x'|^2 / 2) / sqrt(m),  x' = x / h^(1/4),  w_r normal
    out_i = phi(q_i) (sum_j phi(k_j) v_j^T) / phi(q_i) . sum_j phi(k_j)

Choromanski et al., "Rethinking Attention with Performers", arXiv 2009.14794, Lemma 1 and Section
2.4. As in the code of CAB (arXiv 2210.07661), heads have directions of their own, training draws
new independent ones each time, and evaluation keeps one orthogonal draw.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PatternAttention
from attnjax.ops.linear import gaussian_projection
from attnjax.ops.mixers.template import check_positive, masked
from attnjax.ops.normalizer import EMPTY_LSE

FLOOR, OFFSET = 0.1, 1e-4
"""Of the released form: the smallest denominator; what is added to every feature."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performer(PatternAttention):
    """Linear attention with random features whose products estimate exp(q . k / sqrt(h)).

    The largest exponents are subtracted before the exponential, as they cancel in the quotient.

    Attributes:
      features: m, random features of a head.
      seed: of the directions where none are drawn.
      compat: the features and the denominator of the release, which is biased: it adds a constant
        to features and refuses denominators below 0.1, and takes the maximum over padding, too.
    """

    patterns: ClassVar[frozenset[str]] = frozenset(
        {"noncausal_self", "noncausal_cross", "causal_cross"}
    )
    is_random: ClassVar[bool] = True

    features: int = 16
    seed: int = 0
    compat: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "features")

    def projection(self, heads: int, width: int, rng=None, train: bool = False):
        """Return the directions w `[n,m,h]` float32.

        Args:
          heads: n.
          width: h.
          rng: typed key; without one, or outside of training, always the same orthogonal draw.
          train: independent normal directions from the key.
        """
        if train and rng is not None:
            return jax.random.normal(rng, (heads, self.features, width), jnp.float32)
        keys = jax.random.split(jax.random.key(self.seed), heads)
        return jax.vmap(lambda key: gaussian_projection(key, self.features, width))(keys)

    def attend(
        self, params, query, key, value, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        del query_valid, core
        projection = self.projection(*query.shape[2:], rng, train)
        summary = self._summary(projection, key, value, key_valid)
        return self._read(projection, query, summary)

    def summarise(self, params, key, value, key_valid):
        del params
        return self._summary(self.projection(*key.shape[2:]), key, value, key_valid)

    def attend_summary(self, params, query, summary):
        del params
        return self._read(self.projection(*query.shape[2:]), query, summary)

    def _summary(self, projection_nmh, key, value, key_valid):
        """Return sum_j phi(k_j)_r v_j^T, sum_j phi(k_j)_r and the log of what both lack, by r."""
        linear_bsnm, norm_bsn1 = _exponents(key, projection_nmh)
        if self.compat:
            top_b1n1 = linear_bsnm.max(axis=(1, 3), keepdims=True)
            shift_b1nm = jnp.zeros_like(linear_bsnm[:, :1])
            exponent_bsnm = linear_bsnm - norm_bsn1 - top_b1n1
        else:
            exponent_bsnm = linear_bsnm - norm_bsn1
            if key_valid is not None:
                exponent_bsnm = jnp.where(key_valid[:, :, None, None], exponent_bsnm, EMPTY_LSE)
            # Every feature by its own largest: then some term of every quotient's denominator is 1.
            shift_b1nm = jax.lax.stop_gradient(exponent_bsnm.max(axis=1, keepdims=True))
            exponent_bsnm = exponent_bsnm - shift_b1nm
        features_bsnm = masked(self._features(exponent_bsnm), key_valid)
        summary_bnmh = jnp.einsum("bsnm,bsnh->bnmh", features_bsnm, value.astype(jnp.float32))
        return summary_bnmh, features_bsnm.sum(axis=1), shift_b1nm

    def _read(self, projection_nmh, query, summary):
        summary_bnmh, total_bnm, shift_b1nm = summary
        linear_btnm, norm_btn1 = _exponents(query, projection_nmh)
        if self.compat:
            exponent_btnm = linear_btnm - norm_btn1 - linear_btnm.max(axis=3, keepdims=True)
        else:
            # |q|^2 cancels.
            linear_btnm = linear_btnm + shift_b1nm
            top_btn1 = jax.lax.stop_gradient(linear_btnm.max(axis=3, keepdims=True))
            exponent_btnm = linear_btnm - top_btn1
        features_btnm = self._features(exponent_btnm)
        out_btnh = jnp.einsum("btnm,bnmh->btnh", features_btnm, summary_bnmh)
        total_btn1 = jnp.einsum("btnm,bnm->btn", features_btnm, total_bnm)[..., None]
        if self.compat:
            total_btn1 = jnp.maximum(total_btn1, FLOOR)
        else:
            # Where there are no keys: 0 / 1.
            total_btn1 = jnp.where(total_btn1 > 0, total_btn1, 1)
        return (out_btnh / total_btn1).astype(query.dtype)

    def _features(self, exponent):
        offset = OFFSET if self.compat else 0
        return (jnp.exp(exponent) + offset) * self.features**-0.5

    def attend_flops(self, length, context_length, dim, heads):
        return 4.0 * self.features * dim * (length + context_length)


def _exponents(x_btnh, projection_nmh):
    """Return w . x' `[b,t,n,m]` and |x'|^2 / 2 `[b,t,n,1]`, float32."""
    x_btnh = x_btnh.astype(jnp.float32) * x_btnh.shape[-1] ** -0.25
    linear_btnm = jnp.einsum("btnh,nmh->btnm", x_btnh, projection_nmh)
    return linear_btnm, jnp.sum(x_btnh * x_btnh, axis=-1, keepdims=True) / 2
