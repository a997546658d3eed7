# SPDX-License-Identifier: Apache-2.0
"""Masks made of arrays or functions, most of which may be known at run time only."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.mask.algebra import Lowered, Mask, register
from attnjax.ops.mask.visibility import (
    EMPTY,
    FULL,
    PARTIAL,
    Visibility,
    normalise,
    positions_of,
    slice_axis,
    take_axis,
)


@register(("lower", "upper"))
class Ranges(Mask):
    """See `mask.ranges`."""

    lower: Any
    upper: Any

    def visibility(self, t, s):
        if self.lower.shape[-1] not in (1, t):
            raise ValueError(f"ranges are given for {self.lower.shape[-1]} queries, not for {t}")
        xp = np if isinstance(self.lower, np.ndarray) else jnp
        lower, upper = (
            xp.broadcast_to(x, (*x.shape[:-1], t)).astype(np.int32)
            for x in (self.lower, self.upper)
        )
        return Visibility(*normalise(lower, upper, s))


@register(("query_ids", "key_ids"))
class Segments(Mask):
    """See `mask.segments`."""

    query_ids: Any
    key_ids: Any

    def visibility(self, t, s):
        for name, ids, size in (("query", self.query_ids, t), ("key", self.key_ids, s)):
            if ids.shape[-1] != size:
                raise ValueError(f"{name}_ids cover {ids.shape[-1]} positions, not {size}")
        return Visibility(query_ids=self.query_ids, key_ids=self.key_ids)


@register(("values",))
class Dense(Mask):
    """A bool array `[b|1, n|1, t|1, s|1]`."""

    values: Any

    def dense_bnts(self, t, s):
        shape = self.values.shape
        if shape[2] not in (1, t) or shape[3] not in (1, s):
            raise ValueError(f"mask of shape {shape} does not broadcast to [b,n,{t},{s}]")
        xp = np if isinstance(self.values, np.ndarray) else jnp
        return xp.broadcast_to(self.values, (*shape[:2], t, s))

    def window(self, query_start, queries, key_start, keys, t, s):
        values = self.values
        for axis, start, size in ((2, query_start, queries), (3, key_start, keys)):
            if values.shape[axis] > 1:
                values = slice_axis(values, start, size, axis)
        return Dense(values)

    def take(self, queries, keys, t, s):
        values = self.values
        for axis, positions in ((2, queries), (3, keys)):
            if positions is not None and values.shape[axis] > 1:
                values = take_axis(values, positions, axis)
        return Dense(values)

    def heads(self, start, count):
        return (
            self if self.values.shape[1] == 1 else Dense(slice_axis(self.values, start, count, 1))
        )

    def pad(self, t, s, to_t, to_s):
        widths = [(0, 0)] * 4
        for axis, size, to in ((2, t, to_t), (3, s, to_s)):
            if self.values.shape[axis] > 1:
                widths[axis] = (0, to - size)
        xp = np if isinstance(self.values, np.ndarray) else jnp
        return Dense(xp.pad(self.values, widths))

    def tile(self, query_start, key_start, rows, columns):
        part = self.window(query_start, rows, key_start, columns, 0, 0).values
        return jnp.broadcast_to(part, (*part.shape[:2], rows, columns))


def _pad_positions(blocks, count):
    # What is known stays known while the map is traced.
    xp = np if isinstance(blocks, np.ndarray) else jnp
    return xp.pad(blocks, (0, count))


@register(("kept", "query_blocks", "key_blocks"))
class Blocks(Mask):
    """`kept [b|1, n|1, i, j]` bool over the blocks that positions `[t]` and `[s]` belong to."""

    kept: Any
    query_blocks: Any
    key_blocks: Any
    heads_per_map: int = 1

    def dense_bnts(self, t, s):
        for name, of, size in (("query", self.query_blocks, t), ("key", self.key_blocks, s)):
            if len(of) != size:
                raise ValueError(f"blocks cover {len(of)} {name} positions, not {size}")
        return self._pick(self.query_blocks, self.key_blocks)

    def window(self, query_start, queries, key_start, keys, t, s):
        return dataclasses.replace(
            self,
            query_blocks=slice_axis(self.query_blocks, query_start, queries, 0),
            key_blocks=slice_axis(self.key_blocks, key_start, keys, 0),
        )

    def take(self, queries, keys, t, s):
        take = lambda blocks, at: blocks if at is None else take_axis(blocks, at, 0)
        return dataclasses.replace(
            self,
            query_blocks=take(self.query_blocks, queries),
            key_blocks=take(self.key_blocks, keys),
        )

    def pad(self, t, s, to_t, to_s):
        return dataclasses.replace(
            self,
            query_blocks=_pad_positions(self.query_blocks, to_t - t),
            key_blocks=_pad_positions(self.key_blocks, to_s - s),
        )

    def tile(self, query_start, key_start, rows, columns):
        return jnp.asarray(
            self._pick(
                slice_axis(self.query_blocks, query_start, rows, 0),
                slice_axis(self.key_blocks, key_start, columns, 0),
            )
        )

    def block_map_bnij(self, t, s, block_q, block_k):
        # Exact without the dense mask: a tile sees the blocks between its first and last position.
        rows = _incidence(self.query_blocks, self.kept.shape[2], block_q)
        columns = _incidence(self.key_blocks, self.kept.shape[3], block_k)
        xp = np if all(isinstance(x, np.ndarray) for x in (self.kept, rows, columns)) else jnp
        kept = self.kept.astype(np.float32)
        hits = xp.einsum("Ii,bnij,Jj->bnIJ", rows, kept, columns)
        most = xp.einsum("Ii,Jj->IJ", rows, columns)
        kinds = xp.where(hits == most, FULL, xp.where(hits == 0, EMPTY, PARTIAL)).astype(np.int8)
        return xp.repeat(kinds, self.heads_per_map, axis=1)

    def visible_keys_bnt(self, t, s):
        xp = np if isinstance(self.kept, np.ndarray) else jnp
        count = self.kept.shape[3]
        sizes = xp.zeros(count, np.int32) + (
            np.bincount(self.key_blocks, minlength=count)
            if isinstance(self.key_blocks, np.ndarray)
            else jnp.bincount(self.key_blocks, length=count)
        )
        seen = xp.where(self.kept, sizes, 0).sum(axis=-1, dtype=np.int32)[:, :, self.query_blocks]
        return xp.repeat(seen, self.heads_per_map, axis=1)

    def _pick(self, rows, columns):
        xp = np if isinstance(self.kept, np.ndarray) and isinstance(rows, np.ndarray) else jnp
        kept = xp.asarray(self.kept)[:, :, rows][:, :, :, columns]
        return xp.repeat(kept, self.heads_per_map, axis=1) if self.heads_per_map > 1 else kept


@register(("query_start", "key_start"))
class Predicate(Mask):
    """`function` of positions counted from the two starts."""

    function: Callable[[Any, Any], Any]
    query_start: Any = 0
    key_start: Any = 0

    def dense_bnts(self, t, s):
        if not (isinstance(self.query_start, int) and isinstance(self.key_start, int)):
            return self.tile(0, 0, t, s)
        # Only constants go in, so the answer is known even while something else is traced.
        with jax.ensure_compile_time_eval():
            return np.asarray(self.tile(0, 0, t, s))

    def window(self, query_start, queries, key_start, keys, t, s):
        starts = (self.query_start + query_start, self.key_start + key_start)
        return Predicate(self.function, *starts)

    def take(self, queries, keys, t, s):
        count = lambda start, size: start + np.arange(size, dtype=np.int32)
        at_queries, at_keys = (
            count(start, size) if at is None else start + positions_of(at)
            for start, size, at in ((self.query_start, t, queries), (self.key_start, s, keys))
        )
        return PredicateAt(self.function, at_queries, at_keys)

    def heads(self, start, count):
        return self

    def pad(self, t, s, to_t, to_s):
        return self

    def block_map_bnij(self, t, s, block_q, block_k):
        if not (isinstance(self.query_start, int) and isinstance(self.key_start, int)):
            return super().block_map_bnij(t, s, block_q, block_k)
        # A row of tiles at a time: memory is linear in the keys.
        rows = []
        for first in range(0, t, block_q):
            count = min(block_q, t - first)
            strip = Predicate(self.function, self.query_start + first, self.key_start)
            rows.append(Mask.block_map_bnij(strip, count, s, block_q, block_k))
        return np.concatenate(rows, axis=2)

    def tile(self, query_start, key_start, rows, columns):
        query = self.query_start + query_start + jnp.arange(rows, dtype=jnp.int32)[:, None]
        key = self.key_start + key_start + jnp.arange(columns, dtype=jnp.int32)[None]
        visible = jnp.broadcast_to(self.function(query, key), (rows, columns))
        return visible.astype(bool)[None, None]


@register(("queries", "keys"))
class PredicateAt(Mask):
    """`function` of the positions `queries [t]` and `keys [s]`."""

    function: Callable[[Any, Any], Any]
    queries: Any
    keys: Any

    def dense_bnts(self, t, s):
        if not all(isinstance(at, np.ndarray) for at in (self.queries, self.keys)):
            return self.tile(0, 0, t, s)
        with jax.ensure_compile_time_eval():
            return np.asarray(self.tile(0, 0, t, s))

    def window(self, query_start, queries, key_start, keys, t, s):
        at_queries = slice_axis(self.queries, query_start, queries, 0)
        return PredicateAt(self.function, at_queries, slice_axis(self.keys, key_start, keys, 0))

    def take(self, queries, keys, t, s):
        take = lambda positions, at: positions if at is None else take_axis(positions, at, 0)
        return PredicateAt(self.function, take(self.queries, queries), take(self.keys, keys))

    def heads(self, start, count):
        return self

    def pad(self, t, s, to_t, to_s):
        queries = _pad_positions(self.queries, to_t - t)
        return PredicateAt(self.function, queries, _pad_positions(self.keys, to_s - s))

    def tile(self, query_start, key_start, rows, columns):
        query = jnp.asarray(slice_axis(self.queries, query_start, rows, 0))[:, None]
        key = jnp.asarray(slice_axis(self.keys, key_start, columns, 0))[None]
        visible = jnp.broadcast_to(self.function(query, key), (rows, columns))
        return visible.astype(bool)[None, None]


@register(("lower", "upper", "rows"))
class HiddenRows(Mask):
    """Key c is hidden from the queries of some ranges [lower[r, c], upper[r, c]), int32 `[r, s]`.

    `rows [t]` are the positions of the queries, or None before it is known how many there are.
    """

    lower: Any
    upper: Any
    rows: Any = None

    def visibility(self, t, s):
        return Visibility(rest=self._of(t, s))

    def dense_bnts(self, t, s):
        return self._of(t, s)._see()

    def window(self, query_start, queries, key_start, keys, t, s):
        whole = self._of(t, s)
        bounds = (slice_axis(x, key_start, keys, 1) for x in (whole.lower, whole.upper))
        return HiddenRows(*bounds, slice_axis(whole.rows, query_start, queries, 0))

    def take(self, queries, keys, t, s):
        take = lambda x, at, axis: x if at is None else take_axis(x, at, axis)
        bounds = (take(x, keys, 1) for x in (self.lower, self.upper))
        return HiddenRows(*bounds, take(self._of(t, s).rows, queries, 0))

    def heads(self, start, count):
        return self

    def pad(self, t, s, to_t, to_s):
        rows, xp = self._of(t, s).rows, np if isinstance(self.lower, np.ndarray) else jnp
        bounds = (xp.pad(x, ((0, 0), (0, to_s - s))) for x in (self.lower, self.upper))
        xp = np if isinstance(rows, np.ndarray) else jnp
        more = rows.max(initial=-1) + 1 + np.arange(to_t - t, dtype=np.int32)
        return HiddenRows(*bounds, xp.concatenate([rows, more]).astype(np.int32))

    def tile(self, query_start, key_start, rows, columns):
        bounds = (slice_axis(x, key_start, columns, 1) for x in (self.lower, self.upper))
        part = HiddenRows(*bounds, slice_axis(self.rows, query_start, rows, 0))
        return jnp.asarray(part._see())

    def block_map_bnij(self, t, s, block_q, block_k):
        row = self._of(t, s).rows
        if not (isinstance(row, np.ndarray) and (np.diff(row) == 1).all()):
            return super().block_map_bnij(t, s, block_q, block_k)
        # Rows and columns change places: a column hides what an interval of a row would show.
        bounds = (x[None, None] - row[0] for x in (self.lower, self.upper))
        hidden = Visibility(*normalise(*bounds, t)).block_map(s, t, block_k, block_q)
        return FULL - hidden.swapaxes(2, 3)

    def _of(self, t, s):
        if self.lower.shape[-1] != s:
            raise ValueError(f"columns are given for {self.lower.shape[-1]} keys, not for {s}")
        return (
            self
            if self.rows is not None
            else HiddenRows(self.lower, self.upper, np.arange(t, dtype=np.int32))
        )

    def _see(self):
        row = self.rows[:, None]
        seen = True
        for lower, upper in zip(self.lower, self.upper, strict=True):
            seen = seen & ((row < lower) | (row >= upper))
        return seen[None, None]


@register(("masks",))
class PerHead(Mask):
    """See `mask.per_head`."""

    masks: tuple

    def visibility(self, t, s):
        parts = [mask.visibility(t, s) for mask in self.masks]
        if any(p.query_ids is not None or p.rest is not None for p in parts):
            return Visibility(rest=PerHead(tuple(Lowered(p) for p in parts)))
        parts = [p.with_intervals(t, s) for p in parts]
        most = max(p.lower.shape[2] for p in parts)
        bounds = []
        for name, empty in (("lower", s), ("upper", s)):
            arrays = [getattr(p, name) for p in parts]
            xp = np if all(isinstance(x, np.ndarray) for x in arrays) else jnp
            b = max(x.shape[0] for x in arrays)
            arrays = [
                xp.pad(
                    xp.broadcast_to(x, (b, *x.shape[1:])),
                    ((0, 0), (0, 0), (0, most - x.shape[2]), (0, 0)),
                    constant_values=empty,
                )
                for x in arrays
            ]
            bounds.append(xp.concatenate(arrays, axis=1))
        return Visibility(*bounds)

    def dense_bnts(self, t, s):
        return _stack_heads([mask.dense_bnts(t, s) for mask in self.masks])

    def visible_keys_bnt(self, t, s):
        parts = [mask.visibility(t, s).visible_keys(t, s) for mask in self.masks]
        return _stack_heads([part[..., None] for part in parts])[..., 0]

    def block_map_bnij(self, t, s, block_q, block_k):
        parts = [mask.visibility(t, s) for mask in self.masks]
        return _stack_heads([part.block_map(t, s, block_q, block_k) for part in parts])

    def pad(self, t, s, to_t, to_s):
        return PerHead(tuple(mask.pad(t, s, to_t, to_s) for mask in self.masks))

    def take(self, queries, keys, t, s):
        return PerHead(tuple(mask.take(queries, keys, t, s) for mask in self.masks))

    def window(self, query_start, queries, key_start, keys, t, s):
        arguments = (query_start, queries, key_start, keys, t, s)
        return PerHead(tuple(mask.window(*arguments) for mask in self.masks))

    def tile(self, query_start, key_start, rows, columns):
        parts = [mask.tile(query_start, key_start, rows, columns) for mask in self.masks]
        return _stack_heads(parts)


@register(("query_lengths",))
class QueryLengths(Mask):
    """Queries beyond the length of their example see nothing."""

    query_lengths: Any

    def visibility(self, t, s):
        row = np.arange(t, dtype=np.int32)
        upper = (row < self.query_lengths[:, None, None, None]) * np.int32(s)
        return Visibility(upper * 0, upper)


def _incidence(blocks_of, count, size):
    """1 where a tile of `size` positions touches a block, float32 `[tiles, count]`."""
    tile = np.arange(len(blocks_of)) // size
    shape = (math.ceil(len(blocks_of) / size), count)
    if not isinstance(blocks_of, np.ndarray):
        return jnp.zeros(shape, jnp.float32).at[tile, blocks_of].set(1)
    touched = np.zeros(shape, np.float32)
    touched[tile, blocks_of] = 1
    return touched


def _stack_heads(parts):
    b = max(part.shape[0] for part in parts)
    xp = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
    return xp.concatenate([xp.broadcast_to(p, (b, *p.shape[1:])) for p in parts], axis=1)
