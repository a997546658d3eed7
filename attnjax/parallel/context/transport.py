# SPDX-License-Identifier: Apache-2.0
"""How keys and values come to the queries of a rank, and their gradients back.

A transport runs inside `shard_map` over one mesh axis. `fold` shows every block of keys that a rank
needs to a step function; `fold_back` also collects what the step has to say about the keys of each
block and adds it up where they live. Blocks are arrays `[b, tokens, ...]`; the next one is on its
way while the present one is worked on, which a compiler with asynchronous collectives overlaps.

`heads_ways` neighbouring ranks that share their heads act as one here.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from attnjax.ops.mask import Runs, Visibility
from attnjax.parallel.context.layout import Layout, as_positions, seen_keys
from attnjax.typing import Array

UNROLLED = 8
"""Hops that are compiled one by one; longer rings are loops."""

Step = Callable[[Any, Array, Any], tuple[Any, Any]]
"""(state, block, positions of its keys) -> (state, what is to be kept of the step).

Positions are an array or `Runs`, see `attnjax.ops.mask`.
"""


class Transport(abc.ABC):
    """What all transports do; they are hashable, their tables are arrays."""

    @abc.abstractmethod
    def tables(self, layout: Layout) -> dict[str, Array]:
        """Return the arrays that `fold` needs, for keys in this layout."""

    @abc.abstractmethod
    def specs(self, axis_name: str) -> dict[str, P]:
        """Return how the tables are divided."""

    @abc.abstractmethod
    def fold(self, block: Array, step: Step, tables: Any, axis_name: str) -> tuple[Any, list]:
        """Run the step over all blocks, the state of the first one being None.

        Returns:
          The last state, and what was kept of each step.
        """

    @abc.abstractmethod
    def fold_back(self, block: Array, step: Step, tables: Any, axis_name: str) -> tuple[Any, Any]:
        """Run the step over all blocks; what it keeps is about the block's keys.

        Returns:
          The last state, and the sum of what all ranks kept about the keys of this one.
        """


def _in_step(following: Any, done: Any) -> tuple[Any, Any]:
    """Let what comes next wait for the present step.

    A scheduler that does not know how long a step takes would make all transfers first, and hold
    all blocks at once.
    """
    return jax.lax.optimization_barrier((following, done))


@dataclasses.dataclass(frozen=True)
class Ring(Transport):
    """Blocks go round from rank to rank.

    Attributes:
      hops: for each hop, where each rank of the ring sends what it holds; none for no ring.
      ranks: of the ring.
      heads_ways: ranks that act as one.
      run: size of a run of the tables, 0 for none.
    """

    hops: tuple[tuple[int, ...], ...]
    ranks: int
    heads_ways: int = 1
    run: int = 0

    def held(self) -> np.ndarray:
        """Return the block that each rank holds at each step, int32 `[steps, ranks]`."""
        held = [np.arange(self.ranks)]
        for hop in self.hops:
            now = np.empty(self.ranks, np.int64)
            now[list(hop)] = held[-1]
            held.append(now)
        return np.stack(held).astype(np.int32)

    def tables(self, layout):
        return {"positions": layout.tables(self.ranks)[0], "held": self.held()}

    def specs(self, axis_name):
        return {"positions": P(), "held": P()}

    def fold(self, block, step, tables, axis_name):
        def visit(block, state, at):
            return step(state, block, as_positions(tables["positions"][at], self.run))

        held = tables["held"][:, jax.lax.axis_index(axis_name) // self.heads_ways]
        if not self.is_loop:
            state, kept = None, []
            for i in range(len(self.hops) + 1):
                following = self._hop(block, i, axis_name) if i < len(self.hops) else None
                state, one = visit(block, state, held[i])
                kept.append(one)
                block, state = _in_step(following, state)
            return state, kept

        def body(carry, at):
            block, state = carry
            following = self._hop(block, 0, axis_name)
            state, one = visit(block, state, at)
            return _in_step(following, state), one

        # The first step makes the state, the last one needs no hop.
        following = self._hop(block, 0, axis_name)
        state, first = visit(block, None, held[0])
        (block, state), middle = jax.lax.scan(body, (following, state), held[1:-1])
        state, last = visit(block, state, held[-1])
        middle = [jax.tree.map(lambda x, i=i: x[i], middle) for i in range(len(self.hops) - 1)]
        return state, [first, *middle, last]

    def fold_back(self, block, step, tables, axis_name):
        def visit(block, state, total, at):
            state, one = step(state, block, as_positions(tables["positions"][at], self.run))
            return state, one if total is None else jax.tree.map(jnp.add, total, one)

        held = tables["held"][:, jax.lax.axis_index(axis_name) // self.heads_ways]
        if not self.is_loop:
            state = total = None
            for i in range(len(self.hops) + 1):
                is_last = i == len(self.hops)
                following = None if is_last else self._hop(block, i, axis_name)
                state, total = visit(block, state, total, held[i])
                block, total = _in_step(following, total)
                if not is_last:
                    total = self._hop(total, i, axis_name)
        else:

            def body(carry, at):
                block, state, total = carry
                following = self._hop(block, 0, axis_name)
                state, total = visit(block, state, total, at)
                following, total = _in_step(following, total)
                return (following, state, self._hop(total, 0, axis_name)), None

            following = self._hop(block, 0, axis_name)
            state, total = visit(block, None, None, held[0])
            carry = (following, state, self._hop(total, 0, axis_name))
            (block, state, total), _ = jax.lax.scan(body, carry, held[1:-1])
            state, total = visit(block, state, total, held[-1])
        if self.hops:
            home = self.held()[-1]
            total = self._permute(total, tuple(int(rank) for rank in home), axis_name)
        return state, total

    @property
    def is_loop(self) -> bool:
        """Whether hops are all alike and too many to be written out."""
        return len(self.hops) > UNROLLED and len({*self.hops}) == 1

    def _hop(self, tree, i, axis_name):
        return self._permute(tree, self.hops[i], axis_name)

    def _permute(self, tree, targets, axis_name):
        ways = self.heads_ways
        pairs = [(r * ways + u, to * ways + u) for r, to in enumerate(targets) for u in range(ways)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), tree)


def ring(ranks: int, layout: Layout) -> Ring:
    """One ring: every rank sends to the next, ranks - 1 times.

    Args:
      ranks: of the ring; they divide those of the layout.
      layout: of the keys.
    """
    hop = tuple((rank + 1) % ranks for rank in range(ranks))
    return Ring((hop,) * (ranks - 1), ranks, layout.ranks // ranks, layout.tables(ranks)[1])


def double_ring(ranks: int, windows: int, layout: Layout) -> Ring:
    """Rings inside windows of neighbours, and a hop to the next window after each round.

    LoongTrain's double ring: of each round of ranks / windows steps, only the first step's block
    has come from another window.

    Args:
      ranks: of the whole ring; they divide those of the layout.
      windows: divides them.
      layout: of the keys.
    """
    size = ranks // windows
    inner = tuple(rank // size * size + (rank % size + 1) % size for rank in range(ranks))
    # The hop outwards also makes the last step of the round that the inner ring leaves out.
    outer = tuple((inner[rank] + size) % ranks for rank in range(ranks))
    hops = (((inner,) * (size - 1) + (outer,)) * windows)[:-1]
    return Ring(hops, ranks, layout.ranks // ranks, layout.tables(ranks)[1])


@dataclasses.dataclass(frozen=True)
class Gather(Transport):
    """Every rank gets all keys, in order: one block.

    Attributes:
      layout: of the keys; its units, put in order, are the sequence.
    """

    layout: Layout

    def tables(self, layout):
        return {}

    def specs(self, axis_name):
        return {}

    def fold(self, block, step, tables, axis_name):
        state, kept = step(None, self._gather(block, axis_name), self._all())
        return state, [kept]

    def fold_back(self, block, step, tables, axis_name):
        state, kept = step(None, self._gather(block, axis_name), self._all())

        def scatter(x):
            x = self._arrange(x, np.argsort(self._order()))
            return jax.lax.psum_scatter(x, axis_name, scatter_dimension=1, tiled=True)

        return state, jax.tree.map(scatter, kept)

    def _all(self):
        return Runs(np.zeros(1, np.int32), self.layout.positions.size)

    def _order(self):
        return np.argsort(self.layout.positions.reshape(-1, self.layout.unit)[:, 0])

    def _gather(self, block, axis_name):
        whole = jax.lax.all_gather(block, axis_name, axis=1, tiled=True)
        return self._arrange(whole, self._order())

    def _arrange(self, x, order):
        """Put units in order, by slices of what stays together."""
        breaks = np.flatnonzero(np.diff(order) != 1) + 1
        unit = self.layout.unit
        parts = [
            jax.lax.slice_in_dim(x, int(part[0]) * unit, (int(part[-1]) + 1) * unit, axis=1)
            for part in np.split(order, breaks)
        ]
        return jnp.concatenate(parts, axis=1)


@dataclasses.dataclass(frozen=True)
class Selected(Transport):
    """Only the units that some query of a rank sees are sent to it, in a few stages.

    MagiAttention's group cast and group reduce, with shapes that are fixed while tracing: in round
    d every rank sends to the one d further on, as many units as the neediest pair asks for.

    Attributes:
      ranks: of the axis.
      unit: tokens sent together.
      stages: of each stage, its rounds (d, units). The keys of the rank itself come first.
    """

    ranks: int
    unit: int
    stages: tuple[tuple[tuple[int, int], ...], ...]
    sends: bytes = dataclasses.field(repr=False)

    def tables(self, layout):
        # [ranks, units of all rounds]: which unit of its own a rank sends, -1 for none.
        send = np.frombuffer(self.sends, np.int32).reshape(self.ranks, -1)
        positions = layout.positions.reshape(self.ranks, -1, self.unit)
        nowhere = np.iinfo(np.int32).max
        found = {"own": layout.positions, "send": np.maximum(send, 0)}
        start = 0
        for i, rounds in enumerate(self.stages):
            at = []
            for distance, count in rounds:
                # What arrives at a rank is what the one `distance` before it has sent.
                sent = np.roll(send[:, start : start + count], distance, axis=0)
                source = (np.arange(self.ranks) - distance) % self.ranks
                come = positions[source[:, None], np.maximum(sent, 0)]
                at.append(np.where(sent[..., None] < 0, nowhere, come).reshape(self.ranks, -1))
                start += count
            arrived = np.concatenate(at, axis=1)
            order = np.argsort(arrived, axis=1, kind="stable")
            found[f"at{i}"] = np.take_along_axis(arrived, order, axis=1).astype(np.int32)
            found[f"order{i}"] = order.astype(np.int32)
            found[f"home{i}"] = np.argsort(order, axis=1).astype(np.int32)
        return found

    def specs(self, axis_name):
        names = ["own", "send"]
        names += [f"{name}{i}" for i in range(len(self.stages)) for name in ("at", "order", "home")]
        return dict.fromkeys(names, P(axis_name))

    def fold(self, block, step, tables, axis_name):
        state, kept = None, []
        arriving = self._fetch(block, 0, tables, axis_name)
        for i in range(len(self.stages) + 1):
            now, at = (block, tables["own"][0]) if i == 0 else (arriving, tables[f"at{i - 1}"][0])
            if i:
                arriving = self._fetch(block, i, tables, axis_name)
            state, one = step(state, now, at)
            kept.append(one)
            block, state = _in_step(block, state)
        return state, kept

    def fold_back(self, block, step, tables, axis_name):
        arriving = self._fetch(block, 0, tables, axis_name)
        state, total = step(None, block, tables["own"][0])
        for i in range(len(self.stages)):
            block, total = _in_step(block, total)
            now, arriving = arriving, self._fetch(block, i + 1, tables, axis_name)
            state, kept = step(state, now, tables[f"at{i}"][0])
            deliver = lambda whole, part, i=i: self._deliver(whole, part, i, tables, axis_name)
            total = jax.tree.map(deliver, total, kept)
        return state, total

    def _rounds(self, i):
        start = sum(count for rounds in self.stages[:i] for _, count in rounds)
        for distance, count in self.stages[i]:
            yield distance, slice(start, start + count)
            start += count

    def _fetch(self, block, i, tables, axis_name):
        """Return the keys of a stage in the order of their positions; None after the last one."""
        if i >= len(self.stages):
            return None
        units = block.reshape(block.shape[0], -1, self.unit, *block.shape[2:])
        parts = []
        for distance, columns in self._rounds(i):
            part = jnp.take(units, tables["send"][0, columns], axis=1)
            part = jax.lax.ppermute(part, axis_name, self._pairs(distance))
            parts.append(part.reshape(block.shape[0], -1, *block.shape[2:]))
        return jnp.take(jnp.concatenate(parts, axis=1), tables[f"order{i}"][0], axis=1)

    def _deliver(self, total, part, i, tables, axis_name):
        """Add what was found out about the keys of a stage where they live."""
        part = jnp.take(part, tables[f"home{i}"][0], axis=1)
        units = total.reshape(total.shape[0], -1, self.unit, *total.shape[2:])
        start = 0
        for distance, columns in self._rounds(i):
            size = (columns.stop - columns.start) * self.unit
            one = part[:, start : start + size].reshape(part.shape[0], -1, *units.shape[2:])
            one = jax.lax.ppermute(one, axis_name, [(b, a) for a, b in self._pairs(distance)])
            # Where nothing was sent, nobody has seen anything: zeros.
            units = units.at[:, tables["send"][0, columns]].add(one)
            start += size
        return units.reshape(total.shape)

    def _pairs(self, distance):
        return [(rank, (rank + distance) % self.ranks) for rank in range(self.ranks)]


def selected(visibility: Visibility, layout: Layout, *, stages: int = 2) -> Selected:
    """Plan which units each rank sends to which.

    Args:
      visibility: static, of the whole sequence.
      layout: of queries and keys.
      stages: into how many the rounds are grouped, of about equal size.

    Raises:
      ValueError: the mask is not known while tracing.
    """
    if not visibility.is_static:
        raise ValueError("sending selected keys needs a mask that is known while tracing")
    ranks, unit = layout.ranks, layout.unit
    needed = needed_keys(visibility, layout)
    needed = np.concatenate([needed, np.zeros((ranks, 1), bool)], axis=1)
    at = np.minimum(layout.positions, layout.length).reshape(ranks, -1, unit)
    # [receiver, sender, unit of the sender]
    wants = np.stack([row[at].any(axis=2) for row in needed])
    rounds, sends = [], []
    for distance in range(1, ranks):
        sender = np.arange(ranks)
        pair = wants[(sender + distance) % ranks, sender]
        count = int(pair.sum(axis=1).max())
        if count:
            send = np.full((ranks, count), -1, np.int32)
            for rank in range(ranks):
                chosen = np.flatnonzero(pair[rank])
                send[rank, : len(chosen)] = chosen
            rounds.append((distance, count))
            sends.append(send)
    total = sum(count for _, count in rounds)
    grouped: list[list[tuple[int, int]]] = [[] for _ in range(stages)]
    done = 0
    for distance, count in rounds:
        grouped[min(stages - 1, done * stages // total)].append((distance, count))
        done += count
    send = np.concatenate(sends, axis=1) if sends else np.zeros((ranks, 0), np.int32)
    kept = tuple(tuple(group) for group in grouped if group)
    return Selected(ranks, unit, kept, send.tobytes())


def needed_keys(visibility: Visibility, layout: Layout) -> np.ndarray:
    """Return which keys some query of each rank sees, bool `[ranks, length]`."""
    rows = (row[row < layout.length] for row in layout.positions)
    return np.stack([seen_keys(visibility, layout.length, row) for row in rows])
