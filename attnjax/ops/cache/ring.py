# SPDX-License-Identifier: Apache-2.0
"""Caches of constant size for streams of any length: a ring of the last tokens, with sinks or not.

The token at position p lies in slot p while p < sinks, and in slot sinks + (p - sinks) % ring
afterwards. What a query sees is then at most two intervals of slots, in whatever state the ring is.
"""

from typing import Any

import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.cache.state import Rotate, SlotCache, check_positive, empty_arrays, register
from attnjax.ops.mask import Mask
from attnjax.ops.normalizer import Normalizer
from attnjax.typing import Array

POSITIONS = ("cache", "absolute")
"""What positions of keys are: places in the cache, as in StreamingLLM, or places in the stream."""


class RingCache(SlotCache):
    """The first `sinks` tokens, and a ring of the last `window + chunk - 1`."""

    sinks: int
    window: int
    chunk: int

    @property
    def most_queries(self) -> int:
        return self.chunk

    @property
    def keeps_first(self) -> bool:
        return self.sinks > 0

    @property
    def _ring(self) -> int:
        return self.window + self.chunk - 1

    def mask(self, queries: int) -> Mask:
        position, exists = self.absolute_queries(queries)
        oldest = jnp.maximum(position - self.window + 1, self.sinks)
        first, last = (self.sinks + (x - self.sinks) % self._ring for x in (oldest, position))
        in_ring, wraps = position >= self.sinks, first > last
        # Sinks lie before the ring, so what has wrapped to its start continues them.
        head = jnp.where(in_ring, jnp.where(wraps, last + 1, self.sinks), position + 1)
        tail = jnp.where(in_ring, jnp.where(wraps, self.slots, last + 1), 0)
        lower = jnp.stack([jnp.zeros_like(first), first], axis=1)
        upper = jnp.where(exists[:, None], jnp.stack([head, tail], axis=1), 0)
        return masks.ranges(lower[:, None], upper[:, None])

    def key_positions(self, queries: int = 1) -> Array:
        slot = jnp.arange(self.slots, dtype=jnp.int32)
        newest = self.length[:, None] - 1 - self.sinks
        # How long ago, counted in places of the ring, each of its slots was written.
        age = (newest - (slot - self.sinks)) % self._ring
        return jnp.where(slot < self.sinks, slot, jnp.maximum(self.sinks + newest - age, 0))

    def _place(self, position_bc):
        is_sink = position_bc < self.sinks
        place = self.sinks + (position_bc - self.sinks) % self._ring
        # Of a chunk longer than the ring only the end may be written: slots must be different.
        is_kept = is_sink | (position_bc >= self.length[:, None] - self._ring)
        return jnp.where(is_sink, position_bc, place), is_kept


@register("window", "chunk")
class WindowCache(RingCache):
    """The last `window` tokens; a query sees `mask.sliding_window(window - 1, 0)`.

    Attributes:
      window: tokens that a query sees, its own included.
      chunk: most queries that attend at once; the ring has `chunk - 1` more places for them.
    """

    window: int
    chunk: int

    sinks = 0

    @classmethod
    def empty(
        cls,
        *,
        batch: int,
        heads: int,
        width: int,
        window: int,
        chunk: int = 1,
        value_width: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "WindowCache":
        """Return a cache without tokens.

        Args:
          batch, heads, width, value_width, dtype: as in `FullCache.empty`.
          window, chunk: see the class.

        Raises:
          ValueError: a size is not positive, or a dtype does not fit.
        """
        check_positive(window=window, chunk=chunk)
        slots = window + chunk - 1
        arrays = empty_arrays(batch, batch, slots, heads, width, value_width, dtype)
        return cls(**arrays, window=window, chunk=chunk)


@register("sinks", "window", "chunk", "positions")
class SinkWindowCache(RingCache):
    """The first and the last tokens (StreamingLLM, arXiv 2309.17453).

    Keys that are rotated as they are read get their places in the cache as positions: a query that
    sees `sinks + window` keys stands at the last place, however long the stream has been.

    Attributes:
      sinks: first tokens of the stream, seen by all.
      window: last tokens that a query sees, its own included.
      chunk: most queries that attend at once; the ring has `chunk - 1` more places for them.
      positions: one of `POSITIONS`.
    """

    sinks: int
    window: int
    chunk: int
    positions: str

    @classmethod
    def empty(
        cls,
        *,
        batch: int,
        heads: int,
        width: int,
        window: int,
        sinks: int = 4,
        chunk: int = 1,
        positions: str = "cache",
        value_width: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "SinkWindowCache":
        """Return a cache without tokens.

        Args:
          batch, heads, width, value_width, dtype: as in `FullCache.empty`.
          window, sinks, chunk, positions: see the class.

        Raises:
          ValueError: a size is not positive, positions are unknown, or a dtype does not fit.
        """
        check_positive(window=window, chunk=chunk)
        if sinks < 0:
            raise ValueError(f"sinks={sinks}: must be at least 0")
        if positions not in POSITIONS:
            raise ValueError(f"positions={positions!r} is unknown; choose from {POSITIONS}")
        slots = sinks + window + chunk - 1
        arrays = empty_arrays(batch, batch, slots, heads, width, value_width, dtype)
        return cls(**arrays, sinks=sinks, window=window, chunk=chunk, positions=positions)

    def query_positions(self, queries: int) -> Array:
        return jnp.maximum(self.absolute_queries(queries)[0] - self._shift(queries), 0)

    def key_positions(self, queries: int = 1) -> Array:
        absolute = super().key_positions()
        moved = jnp.maximum(absolute - self._shift(queries), 0)
        return jnp.where(jnp.arange(self.slots) < self.sinks, absolute, moved)

    def turn(
        self, rotate: Rotate, query: Array, key: Array, normalizer: Any
    ) -> tuple[Array, Array]:
        queries = query.shape[1]
        if queries == 1 or self.positions == "absolute" or not self.sinks:
            return super().turn(rotate, query, key, normalizer)
        if isinstance(normalizer, Normalizer) and normalizer.has_key:
            raise NotImplementedError(
                f"{type(normalizer).__name__} has a key of its own: with places in the cache as "
                f"positions it serves one query at a time, not {queries}"
            )
        # Each query must stand where it would stand alone. From one query to the next the distance
        # to the ring then grows but the distance to the sinks, at last, does not, and no rotation
        # of the keys suits both. So the two scores use different halves of a head twice as wide.
        last = self.sinks + self.window - 1
        at_sinks = jnp.clip(self.absolute_queries(queries)[0], 0, last)
        at_ring = self.query_positions(queries)
        query = jnp.concatenate([rotate(query, at_sinks), rotate(query, at_ring)], axis=-1)
        key = rotate(key, self.key_positions(queries))
        is_sink = (jnp.arange(self.slots) < self.sinks)[:, None, None]
        halves = [jnp.where(is_sink, key, 0), jnp.where(is_sink, 0, key)]
        return query, jnp.concatenate(halves, axis=-1)

    def _shift(self, queries):
        """How far the ring and its queries move towards the start, `[b, 1]`."""
        if self.positions == "absolute":
            return jnp.int32(0)
        first = self.length - jnp.minimum(self.fresh, queries)
        return jnp.maximum(first - (self.sinks + self.window - 1), 0)[:, None]
