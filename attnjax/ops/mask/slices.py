# SPDX-License-Identifier: Apache-2.0
"""The slice language: rectangles of queries and keys, whole or cut along diagonals."""

import dataclasses
import itertools

import numpy as np

from attnjax.ops.mask.visibility import normalise

KINDS = ("full", "causal", "invcausal", "bicausal")
"""Kinds of slices: all; c - r <= nk - nq; c >= r; both. Rows r and columns c count from 0."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A rectangle of queries [query_start, query_stop) and keys [key_start, key_stop), cut by kind.

    Attributes:
      query_start, query_stop, key_start, key_stop: ranges.
      kind: one of `KINDS`.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    kind: str = "full"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} of a slice is unknown; choose from {KINDS}")
        if not (0 <= self.query_start <= self.query_stop and 0 <= self.key_start <= self.key_stop):
            raise ValueError(f"ranges of {self} must be increasing and not negative")

    @property
    def area(self) -> int:
        """Visible elements, in closed form: rectangle, trapezoid or parallelogram."""
        rows, columns = self.query_stop - self.query_start, self.key_stop - self.key_start
        if self.kind == "full":
            return rows * columns
        if self.kind == "bicausal":
            return max(0, columns - rows + 1) * rows
        height = min(rows, columns)
        return (2 * columns - height + 1) * height // 2

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Return lower and upper keys of each row, int64 `[rows]`."""
        rows = np.arange(self.query_stop - self.query_start)
        shift = (self.key_stop - self.key_start) - len(rows)
        lower = np.full(len(rows), self.key_start)
        upper = np.full(len(rows), self.key_stop)
        if self.kind in ("causal", "bicausal"):
            upper = self.key_start + rows + shift + 1
        if self.kind in ("invcausal", "bicausal"):
            lower = self.key_start + rows
        upper = np.clip(upper, self.key_start, self.key_stop)
        return np.minimum(lower, upper), upper

    def column_intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Return first and one past the last row that see each column, int64 `[columns]`."""
        columns = np.arange(self.key_stop - self.key_start)
        rows = self.query_stop - self.query_start
        lower, upper = np.zeros(len(columns), np.int64), np.full(len(columns), rows)
        if self.kind in ("causal", "bicausal"):
            lower = np.clip(columns - (len(columns) - rows), 0, rows)
        if self.kind in ("invcausal", "bicausal"):
            upper = np.minimum(columns + 1, rows)
        return self.query_start + np.minimum(lower, upper), self.query_start + upper


@dataclasses.dataclass(frozen=True)
class Columns:
    """FlashMask's column form: key c is hidden from the rows of two ranges, all others see it.

    Attributes:
      lower_start, lower_end: int32 `[s]`, hidden rows below ("LTS", "LTE").
      upper_start, upper_end: int32 `[s]`, hidden rows above ("UTS", "UTE").
    """

    lower_start: np.ndarray
    lower_end: np.ndarray
    upper_start: np.ndarray
    upper_end: np.ndarray

    def dense(self, t: int) -> np.ndarray:
        """Return bool `[t, s]`."""
        row = np.arange(t)[:, None]
        below = (row >= self.lower_start) & (row < self.lower_end)
        above = (row >= self.upper_start) & (row < self.upper_end)
        return ~(below | above)


def band_slices(a, b, c, d, shift, left, right):
    """Queries [a, b), keys [c, d): -left <= key - (query + shift) <= right."""
    lower = lambda row: c if left is None else max(c, row + shift - left)
    upper = lambda row: d if right is None else min(d, row + shift + right + 1)
    # Rows where a bound stops being cut off by the end of the keys.
    breaks = {a, b}
    if left is not None:
        breaks |= {c - shift + left, d - shift + left}
    if right is not None:
        breaks |= {d - shift - right - 1, c - shift - right}
    edges = sorted(x for x in breaks if a <= x <= b)
    parts = []
    for first, last in itertools.pairwise(edges):
        low, high = lower(first), upper(last - 1)
        if lower(first) >= upper(first):
            continue
        lower_moves = last - first > 1 and lower(first + 1) > low
        upper_moves = last - first > 1 and upper(first) < upper(first + 1)
        kind = KINDS[2 * lower_moves + upper_moves]
        parts.append(Slice(first, last, low, high, kind))
    return tuple(parts)


def prefix_slices(a, b, c, d, prefix):
    """Queries [a, b), keys [c, d): the first `prefix` keys for all, the others causally."""
    first = min(prefix, d - c)
    shift = (d - c) - (b - a)
    # Queries whose own position lies inside the prefix see just the prefix.
    inside = max(0, min(b - a, first - shift))
    parts = (
        Slice(a, a + inside, c, c + first),
        Slice(a + inside, b, c, d, "causal"),
    )
    return tuple(part for part in parts if part.area)


def row_intervals(parts, t, s):
    """Collect the intervals of every row from slices."""
    used = np.zeros(t, np.int64)
    for part in parts:
        used[part.query_start : part.query_stop] += 1
    most = max(1, int(used.max(initial=0)))
    lower, upper = np.zeros((most, t), np.int32), np.zeros((most, t), np.int32)
    used[:] = 0
    for part in parts:
        rows = np.arange(part.query_start, part.query_stop)
        low, up = part.intervals()
        lower[used[rows], rows], upper[used[rows], rows] = low, up
        used[rows] += 1
    return normalise(lower[None, None], upper[None, None], s)


def columns_of(parts, t, s):
    """Hidden row ranges of every column, from the visible ones of all slices."""
    visible: list[list] = [[], []]
    for part in parts:
        low, up = part.column_intervals()
        for store, values, empty in ((visible[0], low, t), (visible[1], up, t)):
            column = np.full(s, empty)
            column[part.key_start : part.key_stop] = values
            store.append(column)
    # Rows and columns change places: what a column sees is what an interval per row says.
    stacked = [np.stack(x).astype(np.int32)[None, None] for x in visible]
    lower, upper = (x[0, 0] for x in normalise(*stacked, t))
    starts = np.concatenate([np.zeros((1, s), np.int64), upper])
    stops = np.concatenate([lower, np.full((1, s), t)])
    starts = np.where(starts < stops, starts, t)
    order = np.argsort(starts, axis=0, kind="stable")
    starts = np.take_along_axis(starts, order, axis=0)
    stops = np.take_along_axis(stops, order, axis=0)
    is_hidden = starts < stops
    if is_hidden[2:].any():
        raise NotImplementedError("a key is hidden from more than two ranges of queries")
    rows = np.zeros((4, s), np.int32)
    first, second = ((starts[i], stops[i]) for i in (0, 1))
    # A single range is called lower when it reaches the last query.
    is_upper = is_hidden[1] | (first[1] < t)
    rows[2], rows[3] = (np.where(is_upper & is_hidden[0], x, 0) for x in first)
    only = is_hidden[0] & ~is_upper
    rows[0], rows[1] = (
        np.where(only, a, np.where(is_hidden[1], b, 0)) for a, b in zip(first, second, strict=True)
    )
    return Columns(*rows)
