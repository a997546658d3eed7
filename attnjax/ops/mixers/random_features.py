# SPDX-License-Identifier: Apache-2.0
"""Attention by random features (FAVOR+): M = phi(Q) phi(K)^T, normalised.

Choromanski et al., arXiv 2009.14794. Q, K, V are [paper symbols]; phi is that method's.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.linear import feature_attention, gaussian_projection, positive_features
from attnjax.ops.mixers.template import Attention, check_positive, masked
from attnjax.typing import Array


def favor_features(
    query: Array, key: Array, projection: Array, *, is_causal: bool = False
) -> tuple[Array, Array]:
    """Return positive random features whose products estimate exp(q . k / sqrt(h)).

    Args:
      query: `[b,t,n,h]`.
      key: `[b,s,n,h]`.
      projection: `[m,h]`, see `attnjax.ops.linear.gaussian_projection`.
      is_causal: keep the features of a key from knowing of later keys, at the price of overflow
        where m directions are longer than some 13 (h above 100).

    Returns:
      Features of queries `[b,t,n,m]` and keys `[b,s,n,m]`, float32, each up to a factor that
      cancels in the weights.
    """
    scale = query.shape[-1] ** -0.25
    return (
        positive_features(query.astype(jnp.float32) * scale, projection, shift_axes=(3,)),
        positive_features(
            key.astype(jnp.float32) * scale, projection, shift_axes=() if is_causal else (1, 3)
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Favor(Attention):
    """Linear attention with positive orthogonal random features, fixed once they are drawn.

    Attributes:
      features: m, number of random features.
      causal: no query sees a later key.
    """

    is_exact: ClassVar[bool] = False

    features: int = 64
    causal: bool = False

    def __post_init__(self):
        check_positive(self, "features")

    def own_params(self, key, length, dim, heads):
        return {"random_projection": gaussian_projection(key, self.features, dim // heads)}

    def attend(self, params, query, key, value, valid):
        query_btnm, key_bsnm = self._features(params, query, key, valid)
        out = feature_attention(query_btnm, key_bsnm, value, is_causal=self.causal)
        return out.astype(value.dtype)

    def weights(self, params, query, key, valid):
        query_btnm, key_bsnm = self._features(params, query, key, valid)
        weights_bnts = jnp.einsum("btnm,bsnm->bnts", query_btnm, key_bsnm)
        weights_bnts = jnp.tril(weights_bnts) if self.causal else weights_bnts
        return weights_bnts / (weights_bnts.sum(axis=-1, keepdims=True) + 1e-8)

    def _features(self, params, query, key, valid):
        projection = jax.lax.stop_gradient(params["random_projection"])
        query_btnm, key_bsnm = favor_features(query, key, projection, is_causal=self.causal)
        return query_btnm, masked(key_bsnm, valid)

    def mixing_flops(self, length, dim, heads):
        return 8.0 * length * self.features * dim

    def mixing_numbers(self, length, dim, heads):
        return 2.0 * length * heads * self.features
