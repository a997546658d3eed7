# SPDX-License-Identifier: Apache-2.0
"""Who holds which tokens: layouts of a sequence over the ranks of a mesh axis.

A causal mask gives the last tokens most work, so equal contiguous shares are unequal work. A layout
is a table of global positions, one row per rank, in increasing order; what does not divide is
filled up at the end of a row. Everything that depends on positions (rotary angles, masks, labels)
takes them from `Layout.positions`.
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from attnjax.ops.mask import Mask, Runs, Visibility
from attnjax.typing import Array

MOST_ROUNDS = 64
"""Units of a rank that are moved one by one; more are left to the partitioner."""


STRIP = (256, 8192)
"""Queries and keys that are looked at together where a mask is no intervals."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A table of positions.

    Attributes:
      positions: int32 `[ranks, size]`, increasing in every row; `length` and above are fillers.
      length: tokens of the sequence.
      is_contiguous: whether rows, one after another, are the sequence.
      unit: tokens that always stay together; divides `size`.
    """

    positions: np.ndarray
    length: int
    is_contiguous: bool = False
    unit: int = 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self):
        table = (self.positions.shape, self.positions.tobytes())
        return (self.length, self.is_contiguous, self.unit, *table)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.positions.shape[0]

    @property
    def size(self) -> int:
        """Tokens that every rank holds, fillers included."""
        return self.positions.shape[1]

    def tables(self, rows: int) -> tuple[np.ndarray, int]:
        """Return positions in a form that is cheap to pick from, for `rows` groups of ranks.

        Returns:
          int32 `[rows, u]` first positions of runs, and the size of a run; all positions, and 0,
          where runs would be many.
        """
        table = self.positions.reshape(rows, -1)
        if table.shape[1] // self.unit > MOST_ROUNDS:
            return table, 0
        return table.reshape(rows, -1, self.unit)[:, :, 0], self.unit

    def split(self, parts: int) -> "Layout":
        """Let each rank share its tokens with others: every row becomes `parts` rows.

        Raises:
          ValueError: the parts do not divide a row.
        """
        if self.size % parts:
            raise ValueError(f"{parts} parts do not divide the {self.size} tokens of a rank")
        positions = self.positions.reshape(self.ranks * parts, self.size // parts)
        unit = math.gcd(self.unit, self.size // parts)
        return Layout(positions, self.length, self.is_contiguous, unit)

    def areas(self, visibility: Visibility) -> np.ndarray:
        """Count the elements of a mask that each rank computes, float64 `[ranks]`.

        Args:
          visibility: static, for the sequence; examples and heads are averaged over.
        """
        return rank_areas(visibility, self.length, self.positions)


def rank_areas(visibility: Visibility, length: int, positions: np.ndarray) -> np.ndarray:
    """Count the elements of a mask that rows of queries see, float64 `[rows]`.

    Args:
      visibility: static, for as many queries as keys; the mean over examples and heads counts.
      length: of the sequence.
      positions: integers `[rows, queries]`; `length` and above count nothing.
    """
    keys = np.asarray(visibility.visible_keys(length, length), np.float64).mean(axis=(0, 1))
    keys = np.append(np.broadcast_to(keys, (length,)), 0.0)
    return keys[np.minimum(positions, length)].sum(axis=1)


def seen_keys(visibility: Visibility, length: int, queries: np.ndarray) -> np.ndarray:
    """Return which keys any of some queries sees, in any example and head, bool `[length]`.

    Args:
      visibility: static, for as many queries as keys.
      length: of the sequence.
      queries: integers below the length.
    """
    if visibility.rest is None and visibility.query_ids is None:
        whole = visibility.with_intervals(length, length)
        lower, upper = (x[..., queries].ravel() for x in (whole.lower, whole.upper))
        count = lambda bounds: np.bincount(bounds, minlength=length + 1)
        return np.cumsum(count(lower) - count(np.maximum(lower, upper)))[:length] > 0
    seen = np.zeros(length, bool)
    for row in range(0, len(queries), STRIP[0]):
        some = queries[row : row + STRIP[0]]
        rows = visibility.take(some, None, length, length)
        for first in range(0, length, STRIP[1]):
            keys = min(STRIP[1], length - first)
            part = rows.window(0, len(some), first, keys, len(some), length)
            found = np.asarray(part.dense(len(some), keys))
            seen[first : first + keys] |= found.any(axis=(0, 1, 2))
    return seen


def contiguous(length: int, ranks: int, *, multiple: int = 1) -> Layout:
    """Equal shares in order.

    Args:
      length: tokens.
      ranks: number of ranks.
      multiple: tokens of a rank are filled up to a multiple of it.
    """
    size = _up(math.ceil(length / ranks), multiple)
    positions = np.arange(ranks * size, dtype=np.int32).reshape(ranks, size)
    return Layout(positions, length, True, size)


def zigzag(length: int, ranks: int, *, multiple: int = 1) -> Layout:
    """Two chunks for each rank, r and 2 ranks - 1 - r: equal work under a causal mask.

    Args:
      length: tokens.
      ranks: number of ranks.
      multiple: tokens of a rank are filled up to a multiple of it.
    """
    size = _up(2 * math.ceil(length / (2 * ranks)), math.lcm(2, multiple))
    chunks = np.arange(ranks * size, dtype=np.int32).reshape(2 * ranks, size // 2)
    rank = np.arange(ranks)
    positions = np.concatenate([chunks[rank], chunks[2 * ranks - 1 - rank]], axis=1)
    return Layout(positions, length, unit=size // 2)


def document_zigzag(lengths: Sequence[int], ranks: int) -> Layout:
    """The zig-zag of every document by itself, as ring attention over packed documents has it.

    Documents are filled up to a multiple of 2 ranks.
    """
    rows: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    size = start = 0
    for length in lengths:
        part = zigzag(length, ranks)
        size += part.size
        for row, positions in zip(rows, part.positions, strict=True):
            row.append(start + positions[positions < length])
        start += length
    return _table(rows, start, size)


def balanced(mask: Mask | Visibility, length: int, ranks: int, chunk: int) -> Layout:
    """Equal numbers of chunks with as equal work as a greedy choice gives.

    Chunks in order of falling work each go to the rank with the least work that still has room
    (MagiAttention's dispatcher: a heap of ranks).

    Args:
      mask: known while tracing.
      length: tokens.
      ranks: number of ranks.
      chunk: tokens of a chunk.

    Raises:
      ValueError: the mask is not known while tracing.
    """
    visibility = mask.visibility(length, length) if isinstance(mask, Mask) else mask
    if not visibility.is_static:
        raise ValueError("a balanced layout needs a mask that is known while tracing")
    room = math.ceil(length / (ranks * chunk))
    count = room * ranks
    chunks = np.arange(count * chunk).reshape(count, chunk)
    work = rank_areas(visibility, length, chunks)
    heap = [(0.0, 0, rank) for rank in range(ranks)]
    chosen: list[list[int]] = [[] for _ in range(ranks)]
    for index in np.argsort(-work, kind="stable"):
        done, held, rank = heapq.heappop(heap)
        chosen[rank].append(int(index))
        if held + 1 < room:
            heapq.heappush(heap, (done + work[index], held + 1, rank))
    positions = chunks[np.sort(np.array(chosen), axis=1)].reshape(ranks, -1)
    return Layout(positions.astype(np.int32), length, unit=chunk)


def hybrid(lengths: Sequence[int], ranks: int, *, tokens: int = 8192) -> Layout:
    """Every document on as many ranks as its length needs, packed by work.

    A document takes min(ranks, 2^ceil(log2(length / tokens))) neighbouring ranks, at least one, in
    zig-zag (the hybrid context parallelism of Megatron); long ones choose first, each the group
    with the least work. Shares are filled up to the largest.

    Args:
      lengths: tokens of each document.
      ranks: number of ranks.
      tokens: what one rank can take of a document.
    """
    starts = np.cumsum([0, *lengths])
    rows: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    work = np.zeros(ranks)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        wanted = 2 ** max(0, math.ceil(math.log2(length / tokens)))
        group = max(g for g in range(1, ranks + 1) if ranks % g == 0 and g <= min(ranks, wanted))
        loads = work.reshape(-1, group).max(axis=1)
        first = int(loads.argmin()) * group
        part = zigzag(length, group)
        for rank, positions in enumerate(part.positions, first):
            rows[rank].append(starts[index] + positions[positions < length])
        work[first : first + group] += length * length / group
    return _table(rows, int(starts[-1]), 0)


def _table(rows, length, size):
    rows = [np.sort(np.concatenate([*row, np.zeros(0, np.int64)])) for row in rows]
    size = max(1, size, *(len(row) for row in rows))
    positions = np.full((len(rows), size), length, np.int32)
    for filled, row in zip(positions, rows, strict=True):
        filled[: len(row)] = row
        filled[len(row) :] += np.arange(size - len(row))
    return Layout(positions, length)


def _up(size, multiple):
    return multiple * math.ceil(size / multiple)


def dispatch(
    array: Array,
    layout: Layout,
    *,
    axis: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: str = "context",
) -> Array:
    """Bring a sequence into the order of a layout; fillers are zero.

    Args:
      array: any dtype; `length` tokens along `axis`.
      layout: the order.
      axis: of the tokens.
      mesh: whose axis `axis_name` the result is divided over; the ambient mesh if None, none if
        there is none.
      axis_name: of the mesh.

    Returns:
      The array with `ranks * size` tokens, rank after rank.

    Raises:
      ValueError: the array has another number of tokens.
    """
    if array.shape[axis] != layout.length:
        raise ValueError(
            f"axis {axis} of {array.shape} has not the {layout.length} tokens of the layout"
        )
    total = layout.ranks * layout.size
    if layout.is_contiguous or _is_permutation(layout):
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, total - layout.length)
        array = jnp.pad(array, widths) if total > layout.length else array
    if layout.is_contiguous:
        return _divide(array, axis, mesh, axis_name)
    moved = _move(array, layout, axis, mesh, axis_name, is_back=False)
    if moved is None:
        positions = layout.positions.reshape(-1)
        moved = jnp.take(array, positions, axis=axis, mode="fill", fill_value=0)
    return _divide(moved, axis, mesh, axis_name)


def undispatch(
    array: Array,
    layout: Layout,
    *,
    axis: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: str = "context",
) -> Array:
    """Undo `dispatch`.

    Args:
      array: `ranks * size` tokens along `axis`.
      layout, axis, mesh, axis_name: as in `dispatch`.

    Returns:
      The array with the `length` tokens in order.

    Raises:
      ValueError: the array has another number of tokens.
    """
    total = layout.ranks * layout.size
    if array.shape[axis] != total:
        raise ValueError(f"axis {axis} of {array.shape} has not the {total} tokens of the layout")
    moved = array
    if not layout.is_contiguous:
        moved = _move(array, layout, axis, mesh, axis_name, is_back=True)
    if moved is not None:
        return jax.lax.slice_in_dim(moved, 0, layout.length, axis=axis)
    flat = layout.positions.reshape(-1)
    where = np.zeros(layout.length, np.int32)
    is_real = flat < layout.length
    where[flat[is_real]] = np.flatnonzero(is_real)
    return _divide(jnp.take(array, where, axis=axis), axis, mesh, axis_name)


def as_positions(row: Array, size: int) -> Array | Runs:
    """Return a row of `Layout.tables` as what masks take."""
    return Runs(row, size) if size else row


def axis_size(mesh: jax.sharding.Mesh | None, axis_name: str) -> int:
    """Return the size of a mesh axis; the ambient mesh's if `mesh` is None, 1 if there is none."""
    ambient = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return dict(ambient.shape).get(axis_name, 1)


def _divide(array, axis, mesh, axis_name):
    ranks = axis_size(mesh, axis_name)
    if ranks == 1 or array.shape[axis] % ranks:
        return array
    entries = [P.UNCONSTRAINED] * array.ndim
    entries[axis] = axis_name
    spec = P(*entries)
    sharding = spec if mesh is None else jax.sharding.NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(array, sharding)


def _move(array, layout, axis, mesh, axis_name, *, is_back):
    """Move whole units between ranks, or return None where that cannot be.

    Where every rank gives and takes as many units as every other, rounds of permutations do it,
    each with one unit of every rank.
    """
    ranks, unit = layout.ranks, layout.unit
    count = layout.size // unit
    if ranks == 1 or axis_size(mesh, axis_name) != ranks or count > MOST_ROUNDS:
        return None
    if not _is_permutation(layout):
        return None
    first = layout.positions.reshape(-1, unit)[:, 0] // unit
    # Unit x lies at slot x % count of rank x // count.
    target = np.empty(ranks * count, np.int64)
    target[first] = np.arange(ranks * count)
    ends = [np.arange(ranks * count), target]
    source, sink = ends[::-1] if is_back else ends
    rounds = _rounds(source // count, sink // count, ranks)
    slots = [[at[chosen] % count for chosen in rounds] for at in (source, sink)]
    tables = []
    for end, found in zip((source, sink), slots, strict=True):
        table = np.zeros((ranks, len(rounds)), np.int32)
        for i, (chosen, slot) in enumerate(zip(rounds, found, strict=True)):
            table[end[chosen] // count, i] = slot
        tables.append(table)

    # Every rank is handed its rows of the tables. Asked for its rank here, XLA refuses to partition
    # the loop of a diffusion sampler ("PartitionId instruction is not supported").
    def local(x, give, take):
        moved = jnp.zeros_like(x)
        for i, chosen in enumerate(rounds):
            part = jax.lax.dynamic_slice_in_dim(x, give[0, i] * unit, unit, axis)
            pairs = zip(source[chosen] // count, sink[chosen] // count, strict=True)
            part = jax.lax.ppermute(part, axis_name, [(int(a), int(b)) for a, b in pairs])
            moved = jax.lax.dynamic_update_slice_in_dim(moved, part, take[0, i] * unit, axis)
        return moved

    spec = P(*(axis_name if i == axis else None for i in range(array.ndim)))
    moving = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, P(axis_name), P(axis_name)), out_specs=spec,
        axis_names={axis_name}, check_vma=False,
    )  # fmt: skip
    return jax.jit(moving)(array, *map(jnp.asarray, tables))


def _is_permutation(layout):
    """Whether rows, fillers included, are the units of the padded sequence in another order."""
    units = layout.positions.reshape(-1, layout.unit)
    first = units[:, 0] // layout.unit
    is_whole = (units == first[:, None] * layout.unit + np.arange(layout.unit)).all()
    return bool(is_whole and (np.sort(first) == np.arange(len(first))).all())


def _rounds(givers: np.ndarray, takers: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Split units into rounds in which every rank gives one and takes one.

    As many units leave every rank as arrive there, so a perfect matching always exists.

    Args:
      givers, takers: rank of each unit, before and after.
      ranks: number of ranks.

    Returns:
      Indices of the units of each round.
    """
    left: list[dict[int, list[int]]] = [{} for _ in range(ranks)]
    for unit, (giver, taker) in enumerate(zip(givers, takers, strict=True)):
        left[giver].setdefault(int(taker), []).append(unit)
    rounds = []
    for _ in range(len(givers) // ranks):
        matched: dict[int, int] = {}

        def place(giver, seen, matched=matched):
            for taker in left[giver]:
                if taker not in seen:
                    seen.add(taker)
                    if taker not in matched or place(matched[taker], seen):
                        matched[taker] = giver
                        return True
            return False

        for giver in range(ranks):
            place(giver, set())
        chosen = []
        for taker, giver in matched.items():
            chosen.append(left[giver][taker].pop())
            if not left[giver][taker]:
                del left[giver][taker]
        rounds.append(np.array(sorted(chosen)))
    return rounds
