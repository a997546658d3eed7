# SPDX-License-Identifier: Apache-2.0
"""What every mask becomes before an implementation sees it: a few key intervals per query.

A mask of any origin is the conjunction of three parts, each of them optional:

    intervals   some r:  lower[b,n,r,t] <= key < upper[b,n,r,t]
    segments    query_ids[b,t] == key_ids[b,s]
    rest        any other mask, evaluated tile by tile

Causal masks, windows, documents, prefixes, shared questions and their combinations are intervals
alone, two or fewer per query, so that a kernel decides visibility with two comparisons per element
and a schedule of tiles follows from counting. Arrays that are known while tracing stay NumPy and
their schedules are worked out on the host; the others are traced, so that new document boundaries
never recompile anything.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Kinds of tiles in a block map: nothing, something, everything is visible."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """Positions that come in stretches of equal size: cheaper to pick than one by one.

    Attributes:
      starts: int32 `[u]`, first position of each stretch.
      size: of all.
    """

    starts: Any
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def positions(self) -> Any:
        """All positions, int32 `[u * size]`."""
        xp = np if isinstance(self.starts, np.ndarray) else jnp
        return (self.starts[:, None] + xp.arange(self.size, dtype=np.int32)).reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """The normal form of a mask for given lengths t and s.

    Attributes:
      lower: `[b|1, n|1, r, t]` int32, first key of each interval, or None for all keys. Intervals
        of one query are disjoint and lie in [0, s]; an empty one has lower >= upper.
      upper: `[b|1, n|1, r, t]` int32, one past the last key of each interval.
      query_ids: `[b|1, t]` int32, or None for no segments.
      key_ids: `[b|1, s]` int32.
      rest: a `Mask` for whatever the other parts cannot say, or None.
    """

    lower: Any = None
    upper: Any = None
    query_ids: Any = None
    key_ids: Any = None
    rest: Any = None

    @property
    def is_static(self) -> bool:
        """Whether all arrays are NumPy, so that schedules can be made on the host."""
        return all(isinstance(leaf, (np.ndarray, int)) for leaf in jax.tree.leaves(self))

    @property
    def is_full(self) -> bool:
        """Whether everything is visible by construction."""
        return self.lower is None and self.query_ids is None and self.rest is None

    def with_intervals(self, t: int, s: int) -> "Visibility":
        """Return the same visibility with explicit intervals (all keys where there were none)."""
        if self.lower is not None:
            return self
        lower = np.zeros((1, 1, 1, t), np.int32)
        return dataclasses.replace(self, lower=lower, upper=np.full_like(lower, s))

    def pad(self, t: int, s: int, to_t: int, to_s: int) -> "Visibility":
        """Extend to longer lengths whose added queries see nothing and added keys are never seen.

        Args:
          t, s: present lengths.
          to_t, to_s: new lengths, not shorter.

        Returns:
          The extended visibility, with explicit intervals.
        """
        if (t, s) == (to_t, to_s):
            return self
        whole = self.with_intervals(t, s)
        lower, upper = (_pad_last(x, to_t, 0) for x in (whole.lower, whole.upper))
        query_ids, key_ids = whole.query_ids, whole.key_ids
        if query_ids is not None:
            query_ids, key_ids = _pad_last(query_ids, to_t, 0), _pad_last(key_ids, to_s, 0)
        rest = whole.rest if whole.rest is None else whole.rest.pad(t, s, to_t, to_s)
        return Visibility(lower, upper, query_ids, key_ids, rest)

    def window(
        self, query_start: Any, queries: int, key_start: Any, keys: int, t: int, s: int
    ) -> "Visibility":
        """Restrict to a range of queries and keys, numbered from their starts.

        Args:
          query_start: first query; an integer, or a traced one.
          queries: number of queries.
          key_start: first key; an integer, or a traced one.
          keys: number of keys.
          t, s: lengths of this visibility, which the ranges must not exceed.

        Returns:
          The visibility of the range alone.
        """
        whole = self.with_intervals(t, s)
        lower, upper = (
            _clip(_slice_last(x, query_start, queries) - key_start, 0, keys)
            for x in (whole.lower, whole.upper)
        )
        query_ids, key_ids = whole.query_ids, whole.key_ids
        if query_ids is not None:
            query_ids = _slice_last(query_ids, query_start, queries)
            key_ids = _slice_last(key_ids, key_start, keys)
        rest = whole.rest
        if rest is not None:
            rest = rest.window(query_start, queries, key_start, keys, t, s)
        return Visibility(lower, upper, query_ids, key_ids, rest)

    def take(self, queries: Any, keys: Any, t: int, s: int) -> "Visibility":
        """Pick out queries and keys, numbered in their new order.

        An interval of keys stays one interval, because keys keep their order.

        Args:
          queries: int32 `[t']` positions, or `Runs`; t and above stand for queries that see
            nothing. None for all, as they are.
          keys: int32 `[s']` positions in increasing order, or such `Runs`; s and above, at the
            end, stand for keys that nobody sees. None for all, as they are.
          t, s: lengths of this visibility.

        Returns:
          The visibility for lengths t' and s', with explicit intervals.
        """
        whole = self.with_intervals(t, s)
        lower, upper = whole.lower, whole.upper
        query_ids, key_ids, rest = whole.query_ids, whole.key_ids, whole.rest
        if queries is not None:
            lower, upper = (_take_last(x, queries) for x in (lower, upper))
            upper = _where(positions_of(queries) < t, upper, lower)
            if query_ids is not None:
                query_ids = _take_last(query_ids, queries)
        if keys is not None:
            lower, upper = (_count_below(keys, x) for x in (lower, upper))
            if key_ids is not None:
                key_ids = _take_last(key_ids, keys)
        if rest is not None:
            rest = rest.take(queries, keys, t, s)
        return Visibility(lower, upper, query_ids, key_ids, rest)

    def heads(self, start: Any, count: int) -> "Visibility":
        """Restrict to a range of heads; what serves all heads stays as it is.

        Args:
          start: first head; an integer, or a traced one.
          count: number of heads.
        """
        lower, upper = (
            x if x is None or x.shape[1] == 1 else slice_axis(x, start, count, 1)
            for x in (self.lower, self.upper)
        )
        rest = self.rest if self.rest is None else self.rest.heads(start, count)
        return dataclasses.replace(self, lower=lower, upper=upper, rest=rest)

    def tile(self, query_start: Any, key_start: Any, rows: int, columns: int) -> Array | None:
        """Evaluate one tile; it must lie inside the lengths (pad first).

        Args:
          query_start, key_start: where it starts; integers or traced.
          rows, columns: its static size.

        Returns:
          bool `[b|1, n|1, rows, columns]`, or None when everything is visible.
        """
        parts = []
        if self.lower is not None:
            key_k = key_start + jnp.arange(columns, dtype=jnp.int32)
            lower, upper = (
                _slice_last(x, query_start, rows)[..., None] for x in (self.lower, self.upper)
            )
            parts.append(((key_k >= lower) & (key_k < upper)).any(axis=2))
        if self.query_ids is not None:
            query = _slice_last(self.query_ids, query_start, rows)[:, None, :, None]
            parts.append(query == _slice_last(self.key_ids, key_start, columns)[:, None, None, :])
        if self.rest is not None:
            parts.append(self.rest.tile(query_start, key_start, rows, columns))
        return functools.reduce(operator.and_, parts) if parts else None

    def dense(self, t: int, s: int) -> Any:
        """Return bool `[b|1, n|1, t, s]`: NumPy when the visibility is static."""
        xp = np if self.is_static else jnp
        visible = xp.ones((1, 1, t, s), bool)
        if self.lower is not None:
            key_s = np.arange(s, dtype=np.int32)
            seen = [
                (key_s >= self.lower[:, :, r, :, None]) & (key_s < self.upper[:, :, r, :, None])
                for r in range(self.lower.shape[2])
            ]
            any_seen = seen[0]
            for more in seen[1:]:
                any_seen = any_seen | more
            visible = visible & any_seen
        if self.query_ids is not None:
            same = self.query_ids[:, None, :, None] == self.key_ids[:, None, None, :]
            visible = visible & same
        if self.rest is not None:
            visible = visible & self.rest.dense_bnts(t, s)
        return visible

    def block_map(self, t: int, s: int, block_q: int, block_k: int) -> Any:
        """Classify the tiles of a grid.

        Args:
          t, s: lengths.
          block_q, block_k: size of a tile; the last row and column of tiles may be smaller.

        Returns:
          int8 `[b|1, n|1, ceil(t / block_q), ceil(s / block_k)]` of `EMPTY`, `PARTIAL`, `FULL`;
          NumPy when the visibility is static. Exact for intervals. A tile on which several parts,
          or segments with more than one id per tile, disagree is called PARTIAL though it may turn
          out empty; a tile called EMPTY or FULL always is.
        """
        xp = np if self.is_static else jnp
        tiles_q, tiles_k = math.ceil(t / block_q), math.ceil(s / block_k)
        kinds = xp.full((1, 1, tiles_q, tiles_k), FULL, np.int8)
        if self.lower is not None:
            is_known = isinstance(self.lower, np.ndarray) and isinstance(self.upper, np.ndarray)
            find = _interval_kinds if is_known else _traced_interval_kinds
            kinds = xp.minimum(kinds, find(self.lower, self.upper, s, block_q, block_k))
        if self.query_ids is not None:
            kinds = xp.minimum(
                kinds, _segment_kinds(self.query_ids, self.key_ids, block_q, block_k)
            )
        if self.rest is not None:
            kinds = xp.minimum(kinds, self.rest.block_map_bnij(t, s, block_q, block_k))
        return kinds

    def visible_keys(self, t: int, s: int) -> Any:
        """Return how many keys each query sees, int32 `[b|1, n|1, t]`."""
        if self.rest is None and self.query_ids is None:
            whole = self.with_intervals(t, s)
            xp = np if self.is_static else jnp
            return xp.maximum(whole.upper - whole.lower, 0).sum(axis=2)
        if self.lower is None and self.query_ids is None:
            return self.rest.visible_keys_bnt(t, s)
        return self.dense(t, s).sum(axis=-1)


def normalise(lower: Any, upper: Any, s: int) -> tuple[Any, Any]:
    """Clip intervals to [0, s], sort them, and make those of one query disjoint.

    Args:
      lower, upper: int32 `[b|1, n|1, r, t]`, in any order and overlapping.
      s: number of keys.

    Returns:
      The same set of keys as disjoint intervals in increasing order. NumPy intervals are also
      merged where they touch, and intervals that are empty for every query dropped.
    """
    is_static = isinstance(lower, np.ndarray) and isinstance(upper, np.ndarray)
    xp = np if is_static else jnp
    lower, upper = xp.clip(lower, 0, s), xp.clip(upper, 0, s)
    if lower.shape[2] == 1:
        return lower, xp.maximum(lower, upper)
    lower = xp.where(lower < upper, lower, s)  # Empty ones go last.
    upper = xp.maximum(lower, upper)
    if is_static and ((lower[:, :, 1:] > upper[:, :, :-1]) | (lower[:, :, 1:] == s)).all():
        used = max(1, int((lower < s).any(axis=(0, 1, 3)).sum()))
        return lower[:, :, :used], upper[:, :, :used]
    if not is_static:
        lower, upper = jax.lax.sort((lower, upper), dimension=2, num_keys=1)
        reached = jax.lax.cummax(upper, axis=2)[:, :, :-1]
        lower = lower.at[:, :, 1:].max(reached)
        return lower, xp.maximum(lower, upper)
    order = np.argsort(lower, axis=2)
    lower, upper = (np.take_along_axis(x, order, axis=2) for x in (lower, upper))
    new_lower, new_upper = np.full_like(lower, s), np.full_like(upper, s)
    slot = np.full(lower[:, :, :1].shape, -1)
    reached = np.full(slot.shape, -1, lower.dtype)
    for r in range(lower.shape[2]):
        low, up = lower[:, :, r : r + 1], upper[:, :, r : r + 1]
        starts = (low > reached) & (low < up)
        slot = slot + starts
        at = np.maximum(slot, 0)
        kept = np.take_along_axis(new_lower, at, axis=2)
        np.put_along_axis(new_lower, at, np.where(starts, low, kept), axis=2)
        reached = np.where(slot >= 0, np.maximum(reached, np.where(low < up, up, reached)), reached)
        np.put_along_axis(new_upper, at, np.where(slot >= 0, reached, s), axis=2)
    used = max(1, int(slot.max()) + 1)
    return new_lower[:, :, :used], new_upper[:, :, :used]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tiles of keys that each tile of queries must visit, FULL ones apart from PARTIAL ones.

    Attributes:
      full: int32 `[b|1, n|1, tiles_q, tiles_k]`; the first `full_count` entries of a row are the
        FULL tiles in increasing order, the others mean nothing.
      full_count: int32 `[b|1, n|1, tiles_q]`.
      partial: the same for PARTIAL tiles.
      partial_count: int32 `[b|1, n|1, tiles_q]`.
    """

    full: Any
    full_count: Any
    partial: Any
    partial_count: Any


def schedule(block_map: Any) -> Schedule:
    """List the tiles to visit from a block map `[b|1, n|1, tiles_q, tiles_k]`.

    Pass the block map with its last two axes exchanged for the queries that each tile of keys must
    visit. NumPy in, NumPy out.
    """
    parts = []
    for kind in (FULL, PARTIAL):
        chosen = block_map == kind
        if isinstance(block_map, np.ndarray):
            tile = np.arange(block_map.shape[-1], dtype=np.int32)
            count = chosen.sum(axis=-1, dtype=np.int32)
            order = np.zeros(block_map.shape, np.int32)
            order[tile < count[..., None]] = np.broadcast_to(tile, block_map.shape)[chosen]
        else:
            order = jnp.argsort(~chosen, axis=-1, stable=True).astype(np.int32)
            count = chosen.sum(axis=-1).astype(np.int32)
        parts += [order, count]
    return Schedule(*parts)


def _interval_kinds(lower, upper, s, block_q, block_k):
    """Classify the tiles of NumPy intervals in time of the rows and of the tiles, not of both.

    Every row gives each tile of keys 0 points if it misses it, r + 1 if it fills it, and 1 for each
    of its r intervals that enters it otherwise. Disjoint intervals that do not touch never reach
    r + 1 in a tile together, so that a tile is FULL if its rows have all given as many. The points
    of an interval change at four tiles at most; a sum over the changes gives those of every tile.
    """
    b, n, r, t = lower.shape
    if r > 1:
        # Two intervals that touch would fill a tile that neither fills alone.
        lower, upper = normalise(lower, upper, s)
        r = lower.shape[2]
    tiles_q, tiles_k = math.ceil(t / block_q), math.ceil(s / block_k)
    # The end of the keys ends their last tile, whatever its size.
    ends = np.where(upper == s, tiles_k, upper // block_k)
    touched = lower // block_k, -(-upper // block_k)
    filled = -(-lower // block_k), ends
    group = np.arange(b * n).reshape(b, n, 1, 1)
    line = (tiles_k + 1) * (group * tiles_q + np.arange(t) // block_q)
    changes = np.zeros(b * n * tiles_q * (tiles_k + 1), np.int32)
    for (first, end), points in ((touched, 1), (filled, r)):
        is_some = (lower < upper) & (first < end)
        for edge, sign in ((first, 1), (end, -1)):
            np.add.at(changes, (line + edge)[is_some], np.int32(sign * points))
    points = changes.reshape(b, n, tiles_q, tiles_k + 1).cumsum(axis=-1, dtype=np.int32)[..., :-1]
    rows = np.minimum(block_q, t - block_q * np.arange(tiles_q, dtype=np.int32))[:, None]
    # EMPTY, PARTIAL and FULL are 0, 1 and 2.
    return (points > 0).astype(np.int8) + (points == (r + 1) * rows)


def _traced_interval_kinds(lower, upper, s, block_q, block_k):
    """Classify the tiles of traced intervals by the number of visible elements of each."""
    b, n, r, t = lower.shape
    tiles_q, tiles_k = math.ceil(t / block_q), math.ceil(s / block_k)
    edges = np.minimum(block_k * np.arange(tiles_k + 1), s)
    rows = np.minimum(block_q, t - block_q * np.arange(tiles_q))[:, None]
    to = tiles_q * block_q
    lower, upper = _pad_last(lower, to, 0), _pad_last(upper, to, 0)
    lower, upper = (x.reshape(b, n, r, tiles_q, block_q, 1) for x in (lower, upper))
    seen = jnp.minimum(upper, edges[1:]) - jnp.maximum(lower, edges[:-1])
    count = jnp.maximum(seen, 0).sum(axis=(2, 4))
    kinds = jnp.where(count == rows * np.diff(edges), FULL, jnp.where(count == 0, EMPTY, PARTIAL))
    return kinds.astype(np.int8)


def _segment_kinds(query_ids, key_ids, block_q, block_k):
    q_low, q_high = _extremes(query_ids, block_q)
    k_low, k_high = _extremes(key_ids, block_k)
    xp = np if isinstance(q_low, np.ndarray) and isinstance(k_low, np.ndarray) else jnp
    q_low, q_high = q_low[:, None, :, None], q_high[:, None, :, None]
    k_low, k_high = k_low[:, None, None, :], k_high[:, None, None, :]
    is_empty = (q_high < k_low) | (k_high < q_low)
    is_full = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    kinds = xp.where(is_full, FULL, xp.where(is_empty, EMPTY, PARTIAL))
    return kinds.astype(np.int8)


def _extremes(ids, block):
    """Smallest and largest id of every tile, `[b|1, tiles]`."""
    size = ids.shape[-1]
    to = block * math.ceil(size / block)
    # Repeating the last id changes neither extreme of the last tile.
    xp = np if isinstance(ids, np.ndarray) else jnp
    padded = xp.pad(ids, ((0, 0), (0, to - size)), mode="edge")
    tiles = padded.reshape(ids.shape[0], to // block, block)
    return tiles.min(axis=-1), tiles.max(axis=-1)


def _pad_last(x, size, value):
    if x.shape[-1] == size:
        return x
    xp = np if isinstance(x, np.ndarray) else jnp
    widths = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return xp.pad(x, widths, constant_values=value)


def _slice_last(x, start, size):
    return slice_axis(x, start, size, x.ndim - 1)


def slice_axis(x: Any, start: Any, size: int, axis: int) -> Any:
    """Return a range of an axis; NumPy stays NumPy unless the start is traced."""
    if isinstance(start, (int, np.integer)):
        index = [slice(None)] * x.ndim
        index[axis] = slice(int(start), int(start) + size)
        return x[tuple(index)]
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size, axis=axis)


def positions_of(positions: Any) -> Any:
    """Return positions as an array, `Runs` or not."""
    return positions.positions if isinstance(positions, Runs) else positions


def take_axis(x: Any, positions: Any, axis: int) -> Any:
    """Pick positions, or `Runs`, out of an axis; NumPy in, NumPy out.

    What lies beyond the axis is given something.
    """
    if isinstance(positions, Runs) and not isinstance(positions.starts, np.ndarray):
        # Slices instead of a gather; a run may end beyond the axis.
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, positions.size)
        x = jnp.pad(jnp.asarray(x), widths)
        count = positions.starts.shape[0]
        parts = [slice_axis(x, positions.starts[i], positions.size, axis) for i in range(count)]
        return jnp.concatenate(parts, axis=axis)
    positions = positions_of(positions)
    is_static = isinstance(x, np.ndarray) and isinstance(positions, np.ndarray)
    xp = np if is_static else jnp
    return xp.take(xp.asarray(x), xp.minimum(positions, x.shape[axis] - 1), axis=axis)


def _take_last(x, positions):
    return take_axis(x, positions, x.ndim - 1)


def _count_below(keys, bounds):
    """Count the keys below each bound, int32 in the shape of the bounds."""
    if isinstance(keys, Runs):
        below = (bounds - keys.starts[i] for i in range(keys.starts.shape[0]))
        return sum(_clip(x, 0, keys.size) for x in below)
    if isinstance(keys, np.ndarray) and isinstance(bounds, np.ndarray):
        return np.searchsorted(keys, bounds).astype(np.int32)
    # Both sorted at once: a binary search would be a loop of gathers.
    return jnp.searchsorted(jnp.asarray(keys), jnp.asarray(bounds), method="sort").astype(np.int32)


def _where(condition, x, y):
    is_static = all(isinstance(array, np.ndarray) for array in (condition, x, y))
    return (np if is_static else jnp).where(condition, x, y)


def _clip(x, low, high):
    return x.clip(low, high)
