# SPDX-License-Identifier: Apache-2.0
"""Attention in linear time: weights that are products of features, random ones among them.

    weights[t, s] = phi(q_t) . phi(k_s) / sum_s phi(q_t) . phi(k_s)

`feature_attention` takes the features, `causal_sums` goes on from a state; `positive_features` are
those of Performers (Choromanski et al., "Rethinking Attention with Performers", arXiv 2009.14794,
Eq. 5 and Lemma 1), `cosine_weighted` those of cosFormer (Qin et al., arXiv 2202.08791, Eq. 10).
"""

import math
from collections.abc import Callable

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


def gaussian_projection(key: PRNGKey, features: int, head_dim: int) -> Array:
    """Draw as many directions as wanted: orthogonal in blocks of h, of a normal vector's length.

    Every row alone is a standard normal vector, so that the features estimate exp(q . k) without
    bias; that the rows of a block are orthogonal lowers the variance (Section 2.4).

    Args:
      key: typed random key.
      features: m, number of directions.
      head_dim: h, width of queries and keys.

    Returns:
      `[m, h]` float32.
    """
    blocks = -(-features // head_dim)
    direction_key, length_key = jax.random.split(key)
    draw = lambda k: jax.random.orthogonal(k, head_dim, dtype=jnp.float32)
    rows = jax.vmap(draw)(jax.random.split(direction_key, blocks)).reshape(-1, head_dim)
    normal = jax.random.normal(length_key, (blocks * head_dim, head_dim), jnp.float32)
    return (rows * jnp.linalg.norm(normal, axis=-1, keepdims=True))[:features]


def positive_features(x: Array, projection: Array, *, shift_axes: tuple[int, ...] = ()) -> Array:
    """Return phi(x) = exp(W x - |x|^2 / 2 - shift) / sqrt(m), all positive.

    Args:
      x: `[b, t, n, h]`.
      projection: W, `[m, h]`.
      shift_axes: axes of `[b, t, n, m]` over which the largest exponent is subtracted, so that it
        cannot overflow; a factor of a query's features (axis 3), or of all keys' (axes 1 and 3),
        cancels in the weights. Axis 1 lets a feature know of later positions by rounding alone.

    Returns:
      `[b, t, n, m]` float32.
    """
    x_btnh = x.astype(jnp.float32)
    scores_btnm = jnp.einsum("btnh,mh->btnm", x_btnh, projection)
    norms_btn1 = jnp.sum(x_btnh * x_btnh, axis=-1, keepdims=True) / 2
    exponent_btnm = scores_btnm - norms_btn1
    if shift_axes:
        shift = exponent_btnm.max(axis=shift_axes, keepdims=True)
        exponent_btnm = exponent_btnm - jax.lax.stop_gradient(shift)
    return jnp.exp(exponent_btnm) / math.sqrt(projection.shape[0])


def cosine_weighted(features: Array, span: int | Array, places: Array | None = None) -> Array:
    """Return features whose products are weighted by cos(pi (t - s) / (2 span)), as in cosFormer.

    [f_t sin(pi t / (2 span)), f_t cos(pi t / (2 span))],  t = 1, 2, ...

    Args:
      features: `[b, t, n, m]` non-negative, such as the ReLU of queries or keys.
      span: M, at least the longer of both lengths; an array `[b]` if examples differ.
      places: `[b, t]`, t of each token where it is not the one above; those behind the span count
        as its end.

    Returns:
      `[b, t, n, 2 m]` float32.

    Raises:
      ValueError: there are more positions than the span.
    """
    t = features.shape[1]
    if isinstance(span, int) and places is None and t > span:
        raise ValueError(f"span={span} is shorter than the {t} positions")
    if places is None:
        places = jnp.arange(1, t + 1)[None]
    span_b1 = jnp.reshape(jnp.asarray(span, jnp.float32), (-1, 1))
    angle_bt = jnp.minimum(places / span_b1, 1) * (math.pi / 2)
    angle_bt11 = angle_bt[:, :, None, None]
    features = features.astype(jnp.float32)
    parts = [features * jnp.sin(angle_bt11), features * jnp.cos(angle_bt11)]
    return jnp.concatenate(parts, axis=-1)


def feature_attention(
    query_features: Array,
    key_features: Array,
    value: Array,
    *,
    is_causal: bool = False,
    epsilon: float = 1e-8,
    floor: float = 0.0,
    chunk: int = 128,
    is_normalized: bool = True,
) -> Array:
    """Attend with weights phi(q) . phi(k), normalised, in time and memory linear in t and s.

    out_t = phi(q_t) (sum_s phi(k_s) v_s^T) / (max(phi(q_t) . sum_s phi(k_s), floor) + epsilon)

    where s runs over all keys, or to t if causal. A key whose features are zero does not exist.

    Args:
      query_features: `[b, t, n, m]`.
      key_features: `[b, s, n, m]`.
      value: `[b, s, n, h]`.
      is_causal: a query sees the keys up to its own position; t and s are equal.
      epsilon: keeps the division finite.
      floor: smallest denominator.
      chunk: positions handled at once by the causal form.
      is_normalized: divide by the sum of the weights; else the weights are used as they are.

    Returns:
      `[b, t, n, h]` float32.

    Raises:
      ValueError: shapes do not fit.
    """
    b, t, n, m = query_features.shape
    s = value.shape[1]
    if key_features.shape != (b, s, n, m) or value.shape[::2] != (b, n) or (is_causal and t != s):
        raise ValueError(
            f"query features {query_features.shape}, key features {key_features.shape} and value "
            f"{value.shape} do not fit (causal: {is_causal})"
        )
    query_btnm, key_bsnm, value_bsnh = (
        x.astype(jnp.float32) for x in (query_features, key_features, value)
    )
    if is_causal:
        out_btnh, total_btn, _ = causal_sums(query_btnm, key_bsnm, value_bsnh, chunk=chunk)
    else:
        summary_bnmh = jnp.einsum("bsnm,bsnh->bnmh", key_bsnm, value_bsnh)
        total_btn = jnp.einsum("btnm,bnm->btn", query_btnm, key_bsnm.sum(axis=1))
        out_btnh = jnp.einsum("btnm,bnmh->btnh", query_btnm, summary_bnmh)
    if not is_normalized:
        return out_btnh
    return out_btnh / (jnp.maximum(total_btn, floor)[..., None] + epsilon)


def causal_sums(
    query: Array,
    key: Array,
    value: Array,
    *,
    features: Callable[[Array], Array] = lambda x: x,
    products: Callable[[Array], Array] | None = None,
    segments: Array | None = None,
    start: tuple[Array, Array] | None = None,
    chunk: int = 128,
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Return numerator and denominator of causal attention with weights phi(q) . phi(k).

    sums_t = phi(q_t) sum_{s <= t} phi(k_s) v_s^T        totals_t = phi(q_t) . sum_{s <= t} phi(k_s)

    Features of one chunk of tokens exist at a time.

    Args:
      query: `[b,t,n,h]`.
      key: `[b,t,n,h]`.
      value: `[b,t,n,hv]`.
      features: phi, takes `[...,h]` float32 to `[...,m]`.
      products: takes q . k to phi(q) . phi(k), where these depend on nothing else: tokens of one
        chunk then meet without their features.
      segments: int `[b,t]`, equal for neighbours that belong together: tokens see those of their
        own segment only.
      start: the state that a call with the tokens before these has returned; not with segments.
      chunk: tokens handled at once.

    Returns:
      sums `[b,t,n,hv]` and totals `[b,t,n]`, float32, and the state after the last token: sums
      `[b,n,m,hv]` of phi(k) v^T and `[b,n,m]` of phi(k), of its segment.

    Raises:
      ValueError: segments are given together with a state.
    """
    if segments is not None and start is not None:
        raise ValueError("causal_sums: segments do not go on from a state")
    b, t, n, _ = query.shape
    size = min(chunk, t)
    count = -(-t // size)

    def cut(x, mode="constant"):
        pad = ((0, 0), (0, count * size - t), *(((0, 0),) * (x.ndim - 2)))
        parts = jnp.pad(x, pad, mode=mode).reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    # Keys that fill the last chunk up have the features of zeros, which need not be zero.
    is_token = (jnp.arange(count * size) < t).astype(jnp.float32).reshape(count, size)
    parts = [cut(x.astype(jnp.float32)) for x in (query, key, value)]
    parts += [is_token, None if segments is None else cut(segments, "edge")]
    is_past = jnp.tril(jnp.ones((size, size), bool))
    if start is None:
        m = jax.eval_shape(features, jax.ShapeDtypeStruct((key.shape[3],), jnp.float32)).shape[0]
        start = (jnp.zeros((b, n, m, value.shape[3]), jnp.float32), jnp.zeros((b, n, m)))
    start = tuple(x.astype(jnp.float32) for x in start)

    def step(carry, part):
        summary_bnmh, total_bnm, last_b = carry
        query, key, value, is_token, segment_bt = part
        scores_bnts = None
        if products is not None:
            scores_bnts = products(jnp.einsum("btnh,bsnh->bnts", query, key)) * is_token
        query, key = features(query), features(key) * is_token[:, None, None]
        seen, own = is_past, key
        if segment_bt is not None:
            seen = is_past & (segment_bt[:, None, :, None] == segment_bt[:, None, None, :])
            before = (segment_bt == last_b[:, None])[..., None]
            goes_on_b = last_b == segment_bt[:, -1]
            own = key * (segment_bt == segment_bt[:, -1:])[..., None, None]
            last_b = segment_bt[:, -1]
        if scores_bnts is None:
            scores_bnts = jnp.einsum("btnm,bsnm->bnts", query, key)
        scores_bnts = scores_bnts * seen
        out_btnh = jnp.einsum("bnts,bsnh->btnh", scores_bnts, value)
        sums_btn = jnp.moveaxis(scores_bnts.sum(axis=-1), 1, 2)
        old_btnh = jnp.einsum("btnm,bnmh->btnh", query, summary_bnmh)
        old_btn = jnp.einsum("btnm,bnm->btn", query, total_bnm)
        if segment_bt is not None:
            old_btnh, old_btn = old_btnh * before[..., None], old_btn * before
            summary_bnmh = summary_bnmh * goes_on_b[:, None, None, None]
            total_bnm = total_bnm * goes_on_b[:, None, None]
        summary_bnmh = summary_bnmh + jnp.einsum("bsnm,bsnh->bnmh", own, value)
        return (summary_bnmh, total_bnm + own.sum(axis=1), last_b), (
            out_btnh + old_btnh,
            sums_btn + old_btn,
        )

    first_b = None if segments is None else segments[:, 0]
    (*state, _), (out, totals) = jax.lax.scan(step, (*start, first_b), tuple(parts))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(b, count * size, *x.shape[3:])[:, :t]
    return join(out), join(totals), tuple(state)


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
    return feature_attention(query_btnm, key_bsnm, value, epsilon=epsilon).astype(query.dtype)
