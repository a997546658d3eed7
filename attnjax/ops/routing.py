# SPDX-License-Identifier: Apache-2.0
"""Who works on what, decided by scores: blocks of keys for queries, experts for tokens."""

import dataclasses
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertAssignment:
    """Which tokens go to which places of which experts.

    Attributes:
      dispatch: bool `[g,t,e,c]`, True where a token takes place c of an expert.
      combine: float32 `[g,t,e,c]`, the weight of what comes back from there.
      load_loss: float32 scalar, `e * sum_e(share of choices * mean probability)`; 1 when all
        experts are chosen alike (Switch Transformer, arXiv 2101.03961, Eq. 4).
      z_loss: float32 scalar, mean of `logsumexp(logits)^2` (ST-MoE, arXiv 2202.08906, Eq. 5).
      dropped: float32 scalar, share of choices for which no place was left.
    """

    dispatch: Array
    combine: Array
    load_loss: Array
    z_loss: Array
    dropped: Array


def expert_capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Return the places of one expert for a group of tokens: the even share times a factor."""
    return max(1, math.ceil(factor * top_k * tokens / experts))


def assign_experts(
    logits: Array, *, top_k: int, capacity: int, valid: Array | None = None
) -> ExpertAssignment:
    """Send every token to its best experts, as long as they have places left.

    The weights are the softmax over all experts; with more than one choice they are divided by
    their sum over the choices. Places are given in the order of tokens, all choices of a token
    before those of the next, so that no token's fate depends on a later one.

    Args:
      logits: `[g,t,e]` floating, scores of e experts for g groups of t tokens; a group has places
        of its own.
      top_k: experts of a token.
      capacity: places of an expert for a group.
      valid: bool `[g,t]`; where it is False the token goes nowhere and counts nowhere.

    Returns:
      An `ExpertAssignment`; losses are over the tokens of all groups.

    Raises:
      ValueError: shapes do not fit, or there are fewer experts than choices.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must be [g,t,e], got shape {logits.shape}")
    g, t, e = logits.shape
    if not 1 <= top_k <= e:
        raise ValueError(f"top_k={top_k}: must be between 1 and the {e} experts")
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: must be at least 1")
    valid = jnp.ones((g, t), bool) if valid is None else jnp.asarray(valid)
    if valid.shape != (g, t) or valid.dtype != bool:
        raise ValueError(f"valid must be bool [g,t] = {(g, t)}, got {valid.dtype} {valid.shape}")
    logits = logits.astype(jnp.float32)
    probabilities_gte = jax.nn.softmax(logits, axis=-1)
    choice_gtke = _best(probabilities_gte, top_k)
    weight_gtk = jnp.einsum("gte,gtke->gtk", probabilities_gte, choice_gtke.astype(jnp.float32))
    if top_k > 1:
        weight_gtk = weight_gtk / jnp.sum(weight_gtk, axis=-1, keepdims=True)
    choice_gtke = choice_gtke * valid[:, :, None, None]
    in_order = choice_gtke.reshape(g, t * top_k, e)
    before = (jnp.cumsum(in_order, axis=1) - in_order).reshape(choice_gtke.shape)
    place_gtk = jnp.sum(before * choice_gtke, axis=-1)
    # One-hot of a place beyond the capacity is zero: the choice is dropped.
    place_gtkc = jax.nn.one_hot(place_gtk, capacity, dtype=jnp.float32)
    choice_gtke = choice_gtke.astype(jnp.float32)
    dispatch = jnp.einsum("gtke,gtkc->gtec", choice_gtke, place_gtkc)
    combine = jnp.einsum("gtk,gtke,gtkc->gtec", weight_gtk, choice_gtke, place_gtkc)
    count = jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
    share_e = jnp.sum(choice_gtke, axis=(0, 1, 2)) / (top_k * count)
    mean_e = jnp.sum(probabilities_gte * valid[..., None], axis=(0, 1)) / count
    square_gt = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return ExpertAssignment(
        dispatch=dispatch > 0,
        combine=combine,
        load_loss=e * jnp.sum(share_e * mean_e),
        z_loss=jnp.sum(jnp.where(valid, square_gt, 0)) / count,
        dropped=1 - jnp.sum(dispatch) / (top_k * count),
    )


def _best(scores_gte, top_k):
    """Return the best experts as one-hot rows, int32 `[g,t,k,e]`.

    One maximum after another: the partitioner would gather whatever goes into a sort.
    """
    left, rows = jax.lax.stop_gradient(scores_gte), []
    for _ in range(top_k):
        row = jax.nn.one_hot(jnp.argmax(left, axis=-1), left.shape[-1], dtype=jnp.int32)
        left = jnp.where(row > 0, -jnp.inf, left)
        rows.append(row)
    return jnp.stack(rows, axis=2)
