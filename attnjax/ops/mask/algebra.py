# SPDX-License-Identifier: Apache-2.0
"""What all masks share, and how they combine."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.mask.slices import Columns, Slice, columns_of
from attnjax.ops.mask.visibility import (
    EMPTY,
    FULL,
    PARTIAL,
    Visibility,
    normalise,
    slice_axis,
)
from attnjax.typing import Array

MOST_INTERVALS = 4
"""Intervals per query that a combination may reach before it is evaluated tile by tile."""


class Mask:
    """Base of all masks. Subclasses are frozen dataclasses and pytrees; arrays are their leaves."""

    def visibility(self, t: int, s: int) -> Visibility:
        """Return the normal form for t queries and s keys.

        Raises:
          ValueError: the mask does not fit these lengths.
        """
        return Visibility(rest=self)

    def slices(self, t: int, s: int) -> tuple[Slice, ...]:
        """Return disjoint slices that make up the mask.

        Raises:
          NotImplementedError: the mask is not made of static slices.
          ValueError: the mask does not fit these lengths.
        """
        raise NotImplementedError(f"{type(self).__name__} is not made of static slices")

    def dense(self, t: int, s: int) -> Any:
        """Return bool `[t, s]`, or `[b|1, n|1, t, s]` if examples or heads differ.

        NumPy if the mask is known while tracing, a JAX array otherwise.
        """
        visible = self.dense_bnts(t, s)
        return visible[0, 0] if visible.shape[:2] == (1, 1) else visible

    def dense_bnts(self, t: int, s: int) -> Any:
        """Return bool `[b|1, n|1, t, s]`."""
        return self.visibility(t, s).dense(t, s)

    def area(self, t: int, s: int) -> Any:
        """Count visible elements: closed form for slices, interval lengths or a sum otherwise.

        Returns:
          An int when one count serves all examples and heads, else `[b|1, n|1]`.
        """
        try:
            return sum(part.area for part in self.slices(t, s))
        except NotImplementedError:
            count = self.visibility(t, s).visible_keys(t, s).sum(axis=-1)
        if count.shape == (1, 1):
            return int(count[0, 0]) if isinstance(count, np.ndarray) else count[0, 0]
        return count

    def block_map(self, t: int, s: int, block_q: int, block_k: int) -> Any:
        """Classify tiles as EMPTY (0), PARTIAL (1) or FULL (2).

        Returns:
          int8 `[tiles_q, tiles_k]`, or `[b|1, n|1, tiles_q, tiles_k]` if examples or heads differ;
          see `Visibility.block_map` for what is exact.
        """
        kinds = self.visibility(t, s).block_map(t, s, block_q, block_k)
        return kinds[0, 0] if kinds.shape[:2] == (1, 1) else kinds

    def columns(self, t: int, s: int) -> Columns:
        """Return the column form.

        Raises:
          NotImplementedError: not made of static slices, or a key is hidden from more than two
            ranges of rows.
        """
        return columns_of(self.slices(t, s), t, s)

    def window(self, query_start, queries, key_start, keys, t, s) -> "Mask":
        """Restrict to a range of queries and keys, numbered from their starts.

        The starts may be traced; t and s are the lengths that this mask is meant for.
        """
        return Lowered(self.visibility(t, s).window(query_start, queries, key_start, keys, t, s))

    def take(self, queries, keys, t, s) -> "Mask":
        """Pick out queries and keys by positions `[t']` and `[s']`, or all where that is None.

        Nothing is promised about positions beyond the lengths t and s. As `tile`, only for masks
        that are their own normal form.
        """
        raise NotImplementedError(f"{type(self).__name__} must be lowered first")

    def heads(self, start, count: int) -> "Mask":
        """Restrict to a range of heads, if heads differ; the start may be traced."""
        return HeadRange(self, start, count)

    def pad(self, t, s, to_t, to_s) -> "Mask":
        """Extend by queries and keys about which nothing is promised.

        As `tile`, only for masks that are their own normal form.
        """
        raise NotImplementedError(f"{type(self).__name__} must be lowered first")

    def tile(self, query_start, key_start, rows: int, columns: int) -> Array:
        """Evaluate one tile as bool `[b|1, n|1, rows, columns]`; starts may be traced.

        Only masks that are their own normal form (`visibility(...).rest is self`) define this.
        """
        raise NotImplementedError(f"{type(self).__name__} has no tiles of its own")

    def visible_keys_bnt(self, t, s) -> Any:
        """Return how many keys each query sees, int32 `[b|1, n|1, t]`."""
        return self.dense_bnts(t, s).sum(axis=-1)

    def block_map_bnij(self, t, s, block_q, block_k) -> Any:
        """Classify tiles, int8 `[b|1, n|1, tiles_q, tiles_k]`."""
        dense = self.dense_bnts(t, s)
        tiles_q, tiles_k = math.ceil(t / block_q), math.ceil(s / block_k)
        xp = np if isinstance(dense, np.ndarray) else jnp
        widths = ((0, 0), (0, 0), (0, tiles_q * block_q - t), (0, tiles_k * block_k - s))
        tiles = xp.pad(dense, widths, mode="edge").reshape(
            *dense.shape[:2], tiles_q, block_q, tiles_k, block_k
        )
        kinds = xp.where(tiles.all((3, 5)), FULL, xp.where(tiles.any((3, 5)), PARTIAL, EMPTY))
        return kinds.astype(np.int8)

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other)


def register(data: Sequence[str] = ()):
    """Register a mask: `data` names the fields that hold arrays or masks, the rest is static."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        meta = [name for name in names if name not in data]
        return jax.tree_util.register_dataclass(cls, list(data), meta)

    return register


@register(("value",))
class Lowered(Mask):
    """A mask that is already in normal form, for fixed lengths."""

    value: Visibility

    def visibility(self, t, s):
        return self.value

    def pad(self, t, s, to_t, to_s):
        return Lowered(self.value.pad(t, s, to_t, to_s))

    def take(self, queries, keys, t, s):
        return Lowered(self.value.take(queries, keys, t, s))

    def heads(self, start, count):
        return Lowered(self.value.heads(start, count))

    def tile(self, query_start, key_start, rows, columns):
        visible = self.value.tile(query_start, key_start, rows, columns)
        return jnp.ones((1, 1, rows, columns), bool) if visible is None else visible


@register(("first", "second"))
class Both(Mask):
    """Conjunction."""

    first: Mask
    second: Mask

    def visibility(self, t, s):
        one, two = self.first.visibility(t, s), self.second.visibility(t, s)
        lower, upper = one.lower, one.upper
        rest = [part.rest for part in (one, two) if part.rest is not None]
        if two.lower is not None and lower is not None:
            if lower.shape[2] * two.lower.shape[2] <= MOST_INTERVALS:
                lower, upper = _intersect(one, two, s)
            else:
                rest.append(Lowered(Visibility(two.lower, two.upper)))
        elif lower is None:
            lower, upper = two.lower, two.upper
        query_ids, key_ids = one.query_ids, one.key_ids
        if two.query_ids is not None and query_ids is not None:
            rest.append(Lowered(Visibility(query_ids=two.query_ids, key_ids=two.key_ids)))
        elif query_ids is None:
            query_ids, key_ids = two.query_ids, two.key_ids
        joined = rest[0] if rest else None
        for part in rest[1:]:
            joined = Meet(joined, part)
        return Visibility(lower, upper, query_ids, key_ids, joined)


@register(("first", "second"))
class Meet(Mask):
    """Conjunction of two masks that are evaluated tile by tile."""

    first: Mask
    second: Mask

    def dense_bnts(self, t, s):
        return self.first.dense_bnts(t, s) & self.second.dense_bnts(t, s)

    def pad(self, *lengths):
        return Meet(self.first.pad(*lengths), self.second.pad(*lengths))

    def take(self, *arguments):
        return Meet(self.first.take(*arguments), self.second.take(*arguments))

    def heads(self, *arguments):
        return Meet(self.first.heads(*arguments), self.second.heads(*arguments))

    def window(self, *arguments):
        return Meet(self.first.window(*arguments), self.second.window(*arguments))

    def tile(self, *arguments):
        return self.first.tile(*arguments) & self.second.tile(*arguments)

    def block_map_bnij(self, *arguments):
        kinds = (self.first.block_map_bnij(*arguments), self.second.block_map_bnij(*arguments))
        xp = np if all(isinstance(kind, np.ndarray) for kind in kinds) else jnp
        return xp.minimum(*kinds)


@register(("first", "second"))
class Either(Mask):
    """Disjunction."""

    first: Mask
    second: Mask

    def visibility(self, t, s):
        one, two = self.first.visibility(t, s), self.second.visibility(t, s)
        if one.is_full or two.is_full:
            return Visibility()
        parts = (one, two)
        lowered = Visibility(rest=Either(*(Lowered(part) for part in parts)))
        if any(part.query_ids is not None or part.rest is not None for part in parts):
            return lowered
        b, n = (max(part.lower.shape[axis] for part in parts) for axis in (0, 1))
        bounds = []
        for name in ("lower", "upper"):
            arrays = [getattr(part, name) for part in parts]
            xp = np if all(isinstance(x, np.ndarray) for x in arrays) else jnp
            arrays = [xp.broadcast_to(x, (b, n, *x.shape[2:])) for x in arrays]
            bounds.append(xp.concatenate(arrays, axis=2))
        lower, upper = normalise(*bounds, s)
        return lowered if lower.shape[2] > MOST_INTERVALS else Visibility(lower, upper)

    def dense_bnts(self, t, s):
        return self.first.dense_bnts(t, s) | self.second.dense_bnts(t, s)

    def pad(self, *lengths):
        return Either(self.first.pad(*lengths), self.second.pad(*lengths))

    def take(self, *arguments):
        return Either(self.first.take(*arguments), self.second.take(*arguments))

    def heads(self, *arguments):
        return Either(self.first.heads(*arguments), self.second.heads(*arguments))

    def window(self, *arguments):
        return Either(self.first.window(*arguments), self.second.window(*arguments))

    def tile(self, *arguments):
        return self.first.tile(*arguments) | self.second.tile(*arguments)


@register(("mask", "start"))
class HeadRange(Mask):
    """Some heads of a mask that is evaluated tile by tile."""

    mask: Mask
    start: Any
    count: int

    def dense_bnts(self, t, s):
        return self._pick(self.mask.dense_bnts(t, s))

    def pad(self, *lengths):
        return dataclasses.replace(self, mask=self.mask.pad(*lengths))

    def window(self, *arguments):
        return dataclasses.replace(self, mask=self.mask.window(*arguments))

    def take(self, *arguments):
        return dataclasses.replace(self, mask=self.mask.take(*arguments))

    def tile(self, *arguments):
        return self._pick(self.mask.tile(*arguments))

    def block_map_bnij(self, *arguments):
        return self._pick(self.mask.block_map_bnij(*arguments))

    def _pick(self, array):
        return array if array.shape[1] == 1 else slice_axis(array, self.start, self.count, 1)


def _intersect(one, two, s):
    bounds = [[], []]
    for i in range(one.lower.shape[2]):
        for j in range(two.lower.shape[2]):
            lows = one.lower[:, :, i : i + 1], two.lower[:, :, j : j + 1]
            ups = one.upper[:, :, i : i + 1], two.upper[:, :, j : j + 1]
            is_static = all(isinstance(x, np.ndarray) for x in (*lows, *ups))
            xp = np if is_static else jnp
            bounds[0].append(xp.maximum(*lows))
            bounds[1].append(xp.minimum(*ups))
    is_static = all(isinstance(x, np.ndarray) for x in itertools.chain(*bounds))
    xp = np if is_static else jnp
    return normalise(*(xp.concatenate(x, axis=2) for x in bounds), s)
