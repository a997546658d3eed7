# SPDX-License-Identifier: Apache-2.0
"""Attention in linear time by positive random features (Performer).

Choromanski et al., "Rethinking Attention with Performers", arXiv 2009.14794, Eq. 5 and Lemma 1.
"""

import math

import jax
import jax.numpy as jnp

from attnjax.typing import Array, PRNGKey


def orthogonal_projection(key: PRNGKey, features: int, head_dim: int) -> Array:
    """Draw the directions of the random features.

    Their length sqrt(m) is that of the reference code of token-to-token models. With it
    phi(q) . phi(k) estimates exp(q . k) only near the origin and where m equals `head_dim`; rows of
    independent normal numbers instead of these estimate it without bias.

    Args:
      key: typed random key.
      features: m, number of directions, at most `head_dim`.
      head_dim: h, width of queries and keys.

    Returns:
      `[m, h]` float32: orthonormal rows times sqrt(m).

    Raises:
      ValueError: there are more directions than dimensions.
    """
    if features > head_dim:
        raise ValueError(f"features={features}: at most head_dim={head_dim} can be orthogonal")
    rows = jax.nn.initializers.orthogonal()(key, (features, head_dim), jnp.float32)
    return rows * math.sqrt(features)


def positive_features(x: Array, projection: Array) -> Array:
    """Return phi(x) = exp(W x - |x|^2 / 2) / sqrt(m), all positive.

    Args:
      x: `[b, t, n, h]`.
      projection: W, `[m, h]`.

    Returns:
      `[b, t, n, m]` float32.
    """
    x_btnh = x.astype(jnp.float32)
    scores_btnm = jnp.einsum("btnh,mh->btnm", x_btnh, projection)
    norms_btn1 = jnp.sum(x_btnh * x_btnh, axis=-1, keepdims=True) / 2
    return jnp.exp(scores_btnm - norms_btn1) / math.sqrt(projection.shape[0])


def linear_attention(
    query: Array, key: Array, value: Array, projection: Array, *, epsilon: float = 1e-8
) -> Array:
    """Attend without the `[t, s]` matrix, in time linear in t and s.

    out_t = phi(q_t) (sum_s phi(k_s) v_s^T) / (phi(q_t) . sum_s phi(k_s) + epsilon)

    Args:
      query: `[b, t, n, h]`.
      key: `[b, s, n, h]`.
      value: `[b, s, n, h]`.
      projection: `[m, h]`, see `orthogonal_projection`.
      epsilon: keeps the division finite.

    Returns:
      `[b, t, n, h]` in the dtype of the query.

    Raises:
      ValueError: shapes do not fit.
    """
    same = query.shape[0] == key.shape[0] and query.shape[2:] == key.shape[2:]
    if not same or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query {query.shape}, key {key.shape} and value {value.shape} must share batch, heads "
            "and head_dim, and key and value their length"
        )
    query_btnm = positive_features(query, projection)
    key_bsnm = positive_features(key, projection)
    summary_bnmh = jnp.einsum("bsnm,bsnh->bnmh", key_bsnm, value.astype(jnp.float32))
    total_btn = jnp.einsum("btnm,bnm->btn", query_btnm, key_bsnm.sum(axis=1))
    out_btnh = jnp.einsum("btnm,bnmh->btnh", query_btnm, summary_bnmh)
    return (out_btnh / (total_btn[..., None] + epsilon)).astype(query.dtype)
