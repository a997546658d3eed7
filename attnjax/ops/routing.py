# SPDX-License-Identifier: Apache-2.0
"""Who works on what, decided by scores: blocks of keys for blocks of queries."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import mask as masks
from attnjax.ops.mask import EMPTY, Mask
from attnjax.typing import Array


def select_blocks(
    query: Array,
    key: Array,
    *,
    block_q: int,
    block_k: int,
    top_k: int,
    mask: Mask | None = None,
    is_shared: bool = False,
) -> Mask:
    """Choose the blocks of keys whose mean fits the mean of a block of queries best.

    score[i, j] = mean(queries of block i) . mean(keys of block j)

    A block of queries keeps the `top_k` best blocks of keys that the mask leaves it anything of,
    counting those that hold the queries' own positions (the last t of the s keys), which it always
    keeps. The choice has no gradient. With `block_q` above 1 a query's blocks depend on the queries
    of its own block behind it, though the keys it sees never lie in its future if the mask says so.

    Args:
      query: `[b,t,n,h]`.
      key: `[b,s,k,h]`; `k` divides `n`.
      block_q, block_k: sizes of blocks; the last ones may be smaller.
      top_k: blocks of keys to keep; with many own blocks more are kept.
      mask: what may be seen at all, such as `mask.causal()`; None for everything.
      is_shared: one choice for all query heads of a key/value head, by their mean query.

    Returns:
      The mask of the chosen blocks, and of what `mask` allows in them; for t queries and s keys.

    Raises:
      ValueError: shapes do not fit, or a size is not positive.
    """
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    if n % k or key.shape[::3] != (b, h) or t > s:
        raise ValueError(f"query {query.shape} and key {key.shape} do not fit")
    for name, size in (("block_q", block_q), ("block_k", block_k), ("top_k", top_k)):
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")
    query, key = (
        jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        for x in (query, key)
    )
    if is_shared:
        query = query.reshape(b, t, k, n // k, h).mean(axis=3)
    heads = query.shape[2]
    sizes_q, sizes_k = _sizes(t, block_q), _sizes(s, block_k)
    query_bikgh = _means(query, block_q, sizes_q).reshape(b, -1, k, heads // k, h)
    scores_bnij = jnp.einsum(
        "bikgh,bjkh->bkgij", query_bikgh, _means(key, block_k, sizes_k)
    ).reshape(b, heads, len(sizes_q), len(sizes_k))

    allowed = True
    if mask is not None:
        kinds = mask.visibility(t, s).block_map(t, s, block_q, block_k)
        allowed = _by_choice(jnp.asarray(kinds) != EMPTY, n, heads)
    own_ij = _own_blocks(t, s, block_q, block_k)
    ranked = jnp.where(own_ij, jnp.inf, jnp.where(allowed, scores_bnij, -jnp.inf))
    rank = jnp.argsort(jnp.argsort(-ranked, axis=-1, stable=True), axis=-1)
    kept = ((rank < top_k) | own_ij) & allowed
    chosen = masks.blocks(kept, sizes_q, sizes_k, heads_per_map=n // heads)
    return chosen if mask is None else chosen & mask


def _sizes(length, block):
    return [min(block, length - start) for start in range(0, length, block)]


def _means(x_bsnh, block, sizes):
    b, s, n, h = x_bsnh.shape
    padded = jnp.pad(x_bsnh, ((0, 0), (0, block * len(sizes) - s), (0, 0), (0, 0)))
    sums = padded.reshape(b, len(sizes), block, n, h).sum(axis=2)
    return sums / np.asarray(sizes, np.float32)[:, None, None]


def _own_blocks(t, s, block_q, block_k):
    own = np.zeros((math.ceil(t / block_q), math.ceil(s / block_k)), bool)
    query = np.arange(t)
    own[query // block_q, (query + s - t) // block_k] = True
    return own


def _by_choice(allowed_bnij, n, heads):
    """Reduce `[b|1, n|1, i, j]` to one row for each choice, allowed if any of its heads is."""
    if allowed_bnij.shape[1] == 1 or heads == n:
        return allowed_bnij
    b, _, i, j = allowed_bnij.shape
    return allowed_bnij.reshape(b, heads, n // heads, i, j).any(axis=2)
