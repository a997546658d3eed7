# SPDX-License-Identifier: Apache-2.0
"""Masks as values: who may attend whom, said once and understood by every implementation.

    from attnjax.ops import attention, mask
    attention(q, k, v, mask=mask.causal() & mask.segments(ids, ids))

A mask knows nothing of batch or heads unless it must, takes the lengths t and s where it is used,
and combines with `&` and `|`. True means "may attend". When t and s differ, queries are the last t
positions of the s keys (bottom-right alignment), as in decoding with a cache.

The slice language and the fourteen patterns are those of LongCA-bench (arXiv 2510.17896), with keys
strictly below a prefix length visible to all, and the symmetric global window of its text rather
than of its generator.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.mask import arrays, patterns
from attnjax.ops.mask.algebra import Mask
from attnjax.ops.mask.slices import Columns, Slice
from attnjax.ops.mask.visibility import (
    EMPTY,
    FULL,
    PARTIAL,
    Runs,
    Schedule,
    Visibility,
    schedule,
)
from attnjax.typing import Array

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Columns",
    "Mask",
    "Runs",
    "Schedule",
    "Slice",
    "Visibility",
    "array",
    "as_mask",
    "block_causal_document",
    "blocks",
    "causal",
    "causal_blockwise",
    "documents",
    "from_columns",
    "full",
    "global_sliding_window",
    "padding",
    "per_head",
    "predicate",
    "prefix_lm",
    "prefix_lm_documents",
    "ranges",
    "schedule",
    "segments",
    "share_question",
    "slices",
    "sliding_window",
]


def full() -> Mask:
    """Everybody sees everything."""
    return patterns.Full()


def as_mask(mask: Mask | Array) -> Mask:
    """Return a mask as it is, and an array as `array` does."""
    return mask if isinstance(mask, Mask) else array(mask)


def causal() -> Mask:
    """A query sees the keys up to its own position."""
    return patterns.Band(None, 0)


def sliding_window(left: int | None, right: int | None) -> Mask:
    """A query at position p sees the keys from p - left to p + right, both included.

    Args:
      left: distance backwards, at least 0; None: no limit.
      right: distance forwards, at least 0; 0 for a causal window, None: no limit.

    Raises:
      ValueError: a distance is negative.
    """
    for name, size in (("left", left), ("right", right)):
        if size is not None and size < 0:
            raise ValueError(f"{name}={size}: a window reaches at least 0 positions")
    return patterns.Band(left, right)


def documents(lengths: Sequence[int], *, causal: bool) -> Mask:
    """Documents one after another that do not see each other.

    Args:
      lengths: tokens of each; positions after the last document see and show nothing.
      causal: whether documents are causal inside.
    """
    return patterns.Documents(_lengths(lengths), causal)


def segments(query_ids: Array, key_ids: Array) -> Mask:
    """Queries see the keys with the same id; ids need no order and may be known at run time only.

    Args:
      query_ids: integers `[t]` or `[b, t]`.
      key_ids: integers `[s]` or `[b, s]`.

    Raises:
      ValueError: ids are not integers or of another rank.
    """
    checked = []
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
        if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers [t] or [b,t], got {ids.dtype} {ids.shape}")
        checked.append(ids.reshape(-1, ids.shape[-1]).astype(np.int32))
    return arrays.Segments(*checked)


def padding(key_lengths: Array, query_lengths: Array | None = None) -> Mask:
    """Ragged batches: example i has its own number of keys and, if given, of queries.

    Args:
      key_lengths: integers `[b]`; may be traced.
      query_lengths: integers `[b]`; rows beyond see nothing and give zero.
    """
    keys = _traced_or_numpy(key_lengths)[:, None, None, None]
    mask: Mask = arrays.Ranges(keys * 0, keys)
    if query_lengths is None:
        return mask
    return mask & arrays.QueryLengths(_traced_or_numpy(query_lengths))


def ranges(lower: Array, upper: Array) -> Mask:
    """A query sees the keys of its intervals [lower, upper); the most general run-time form.

    Args:
      lower: integers `[b|1, n|1, r, t|1]`, r intervals per query, in any order; may be traced.
      upper: integers of the same shape.

    Raises:
      ValueError: shapes differ or are not of rank 4.
    """
    lower, upper = _traced_or_numpy(lower), _traced_or_numpy(upper)
    if lower.ndim != 4 or lower.shape != upper.shape:
        raise ValueError(f"bounds must be [b,n,r,t] and alike, got {lower.shape}, {upper.shape}")
    return arrays.Ranges(lower, upper)


def prefix_lm(prefix: int) -> Mask:
    """Keys below `prefix` are visible to all, the others causally."""
    return patterns.Prefix(_count("prefix", prefix))


def prefix_lm_documents(lengths: Sequence[int], prefix: int) -> Mask:
    """Each document is a prefix language model of the same prefix length."""
    return patterns.PrefixDocuments(_lengths(lengths), _count("prefix", prefix))


def share_question(lengths: Sequence[int]) -> Mask:
    """Causal documents that all see the whole of the first one, the question."""
    return patterns.ShareQuestion(_lengths(lengths))


def causal_blockwise(lengths: Sequence[int]) -> Mask:
    """Causal documents, the last of which also sees everything before it."""
    return patterns.CausalBlockwise(_lengths(lengths))


def global_sliding_window(window: int, global_tokens: int | None = None) -> Mask:
    """|query - key| <= window, or either is among the first `global_tokens` (default: window)."""
    tokens = window if global_tokens is None else global_tokens
    return patterns.GlobalWindow(_count("window", window), _count("global_tokens", tokens))


def block_causal_document(lengths: Sequence[int], block: int) -> Mask:
    """Documents of blocks that see the earlier blocks of their document and all of their own."""
    if block < 1:
        raise ValueError(f"block={block}: must be at least 1")
    return patterns.BlockCausalDocuments(_lengths(lengths), block)


def blocks(
    block_map: Array,
    query_sizes: int | Sequence[int],
    key_sizes: int | Sequence[int],
    *,
    heads_per_map: int = 1,
) -> Mask:
    """Block-sparse attention: a block of queries sees the blocks of keys that its row keeps.

    Args:
      block_map: bool `[i, j]`, `[n, i, j]` or `[b, n, i, j]`; may be known at run time only.
      query_sizes: size of all blocks of queries, or of each.
      key_sizes: size of all blocks of keys, or of each.
      heads_per_map: query heads that share one map, as with one map per key/value head.

    Raises:
      ValueError: the map has another rank, or sizes of another number than blocks.
    """
    kept = block_map if isinstance(block_map, jax.Array) else np.asarray(block_map)
    if not 2 <= kept.ndim <= 4 or kept.dtype != bool:
        raise ValueError(f"block_map must be bool [..., i, j], got {kept.dtype} {kept.shape}")
    kept = kept.reshape((1,) * (4 - kept.ndim) + kept.shape)
    positions = []
    for name, sizes, count in (
        ("query", query_sizes, kept.shape[2]),
        ("key", key_sizes, kept.shape[3]),
    ):
        sizes = [sizes] * count if isinstance(sizes, int) else list(sizes)
        if len(sizes) != count or min(sizes) < 1:
            raise ValueError(f"{name}_sizes {sizes} must be {count} positive sizes")
        positions.append(np.repeat(np.arange(count, dtype=np.int32), sizes))
    return arrays.Blocks(kept, *positions, heads_per_map)


def slices(parts: Sequence[Slice | tuple]) -> Mask:
    """A mask from disjoint slices (query_start, query_stop, key_start, key_stop, kind)."""
    return patterns.Slices(tuple(p if isinstance(p, Slice) else Slice(*p) for p in parts))


def from_columns(columns: Columns) -> Mask:
    """A mask in FlashMask's column form, evaluated from the row indices of its keys.

    Args:
      columns: as `Mask.columns` returns it; its arrays `[s]` may be known at run time only.
    """
    bounds = (
        (columns.lower_start, columns.upper_start),
        (columns.lower_end, columns.upper_end),
    )
    stacked = []
    for pair in bounds:
        xp = np if all(isinstance(x, np.ndarray) for x in pair) else jnp
        stacked.append(xp.stack(pair).astype(np.int32))
    return arrays.HiddenRows(*stacked)


def predicate(function: Callable[[Array, Array], Array]) -> Mask:
    """Visible where `function(query, key)` is True.

    Args:
      function: takes integer positions that broadcast against each other; must be a pure function
        of them. Kept as a static value: use the same function object to avoid recompilation.
    """
    return arrays.Predicate(function)


def per_head(masks: Sequence[Mask]) -> Mask:
    """One mask for each query head."""
    return arrays.PerHead(tuple(masks))


def array(values: Array) -> Mask:
    """A bool array, broadcastable to `[b, n, t, s]`.

    Raises:
      ValueError: not bool, or of rank above 4.
    """
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if values.dtype != bool:
        raise ValueError(f"mask must be bool (True = may attend), got {values.dtype}")
    if values.ndim > 4:
        raise ValueError(f"mask must broadcast to [b,n,t,s], got shape {values.shape}")
    return arrays.Dense(values.reshape((1,) * (4 - values.ndim) + values.shape))


def _traced_or_numpy(x):
    return x.astype(jnp.int32) if isinstance(x, jax.Array) else np.asarray(x, np.int32)


def _count(name, value):
    if value < 0:
        raise ValueError(f"{name}={value}: must be at least 0")
    return int(value)


def _lengths(lengths):
    lengths = tuple(int(x) for x in lengths)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths of documents must be positive, got {lengths[:8]}")
    return lengths
