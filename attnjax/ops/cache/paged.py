# SPDX-License-Identifier: Apache-2.0
"""A cache whose examples share a pool of pages, taken as they grow and given back when they end."""

import dataclasses
import math
from typing import Any, Self

import jax.numpy as jnp

from attnjax.ops.cache.state import (
    Cache,
    causal_mask,
    check_positive,
    empty_arrays,
    register,
)
from attnjax.ops.cache.storage import Quantisation, clear, write
from attnjax.ops.lengths import known
from attnjax.ops.mask import Mask
from attnjax.typing import Array


@register()
class PagedCache(Cache):
    """Tokens in pages of a pool that all examples share.

    Which pages are free follows from the table alone, so allocation is a function of values: an
    append takes the lowest free pages, example by example, and `free` gives back and clears those
    of finished examples. `share` lets examples begin with the tokens of another: its full pages,
    which nobody writes any more, are then held by all of them, until the last one is freed. The
    pool cannot be sharded along the batch. Attending gathers the pages of every example, so it
    costs a copy of them.

        >>> import jax, jax.numpy as jnp
        >>> share = jax.jit(PagedCache.share)
        >>> sizes = dict(pages=6, page_size=4, max_pages_per_sequence=3)
        >>> cache = PagedCache.empty(batch=2, heads=1, width=8, **sizes)
        >>> prompt_bckh = jnp.ones((2, 9, 1, 8))
        >>> cache = cache.append(prompt_bckh, prompt_bckh, lengths=jnp.array([9, 0]))
        >>> cache = share(cache, 0, jnp.array([False, True]))  # The second begins with it too.
        >>> cache.table.tolist(), cache.length.tolist()
        ([[0, 1, 2], [0, 1, 3]], [9, 9])
        >>> cache = cache.free(jnp.array([True, False]))
        >>> cache.is_free().tolist()
        [False, False, True, False, True, True]

    Attributes:
      key: `[pages, page_size, k, h]`.
      value: `[pages, page_size, k, hv]`.
      table: int32 `[b, most_pages]`, the pages of each example in order; -1 for none.
    """

    table: Array

    @classmethod
    def empty(
        cls,
        *,
        batch: int,
        heads: int,
        width: int,
        pages: int,
        page_size: int,
        max_pages_per_sequence: int,
        value_width: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "PagedCache":
        """Return a cache without tokens.

        Args:
          batch, heads, width, value_width: as in `FullCache.empty`.
          pages: pages in the pool.
          page_size: tokens of a page.
          max_pages_per_sequence: most pages of an example.
          dtype: floating dtype of the storage, or a pair for keys and values.

        Raises:
          ValueError: a size is not positive, or the dtype is not floating.
        """
        check_positive(
            pages=pages, page_size=page_size, max_pages_per_sequence=max_pages_per_sequence
        )
        if any(
            isinstance(x, Quantisation) for x in (dtype if isinstance(dtype, tuple) else [dtype])
        ):
            raise ValueError("pages are not quantised: choose a floating dtype")
        return cls(
            **empty_arrays(batch, pages, page_size, heads, width, value_width, dtype),
            table=jnp.full((batch, max_pages_per_sequence), -1, jnp.int32),
        )

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[1]

    @property
    def slots(self) -> int:
        return self.table.shape[1] * self.page_size

    @property
    def most_tokens(self) -> int:
        return self.slots

    def is_free(self) -> Array:
        """Return bool `[pages]`: whether nobody holds a page."""
        pages = self.key.shape[0]
        held = jnp.where(self.table < 0, pages, self.table).ravel()
        return jnp.ones((pages,), bool).at[held].set(False, mode="drop")

    def mask(self, queries: int) -> Mask:
        return causal_mask(self, queries)

    def contents(self, dtype: Any) -> tuple[Array, Array]:
        b, count = self.table.shape
        # Beyond the pool there is nothing but zeros: no page of somebody else may be read, not even
        # where it is masked, because it may hold NaN.
        table = jnp.where(self.table < 0, self.key.shape[0], self.table)
        gather = lambda x: jnp.take(x, table, axis=0, mode="fill", fill_value=0)
        joined = lambda x: gather(x).reshape(b, count * self.page_size, *x.shape[2:])
        return joined(self.key).astype(dtype), joined(self.value).astype(dtype)

    def overflowed(self) -> Array:
        is_missing = (self.table < 0) & self._is_needed(self.length)
        return super().overflowed() | is_missing.any(axis=1)

    def free(self, examples: Array) -> Self:
        examples = self._check_examples(examples)
        table = jnp.where(examples[:, None], -1, self.table)
        after = dataclasses.replace(
            self,
            table=table,
            length=jnp.where(examples, 0, self.length),
            fresh=jnp.where(examples, 0, self.fresh),
        )
        gone = after.is_free()
        return dataclasses.replace(after, key=clear(self.key, gone), value=clear(self.value, gone))

    def share(
        self, source: Array | int, examples: Array, tokens: Array | int | None = None
    ) -> Self:
        """Return the cache with some examples beginning with the first tokens of another.

        Full pages are not copied; of one that is not full each example gets a copy.

        Args:
          source: int, the example that has the tokens.
          examples: bool `[b]`, those that are to begin with them; what they held is freed. The
            source stays as it is.
          tokens: int, how many of its tokens; all if None. Traced numbers are clipped to
            [0, length of the source].

        Returns:
          The cache. No token of these examples is fresh. Where no page is left for the copy, an
          example has overflowed.

        Raises:
          ValueError: the source is not an example, it has fewer tokens, or, where lengths are
            known, no page is left.
        """
        examples = self._check_examples(examples)
        self._check_share(source, tokens)
        b, count = self.table.shape
        source = jnp.asarray(source, jnp.int32)
        is_new = examples & (jnp.arange(b) != source)
        after = self.free(is_new)
        length = after.length[source]
        if tokens is not None:
            length = jnp.clip(jnp.asarray(tokens, jnp.int32), 0, length)
        full, rest = length // self.page_size, length % self.page_size
        entry = jnp.arange(count, dtype=jnp.int32)
        held = after.table[source]
        prefix = jnp.where(entry < full, held, -1)
        after = dataclasses.replace(
            after,
            table=jnp.where(is_new[:, None], prefix, after.table),
            length=jnp.where(is_new, length, after.length),
        )
        original = held[jnp.clip(full, 0, count - 1)]
        is_wanted = is_new[:, None] & (entry == full) & (rest > 0) & (original >= 0)
        after._check_free(is_wanted.sum())
        table = after._allocate(is_wanted)
        pages = self.key.shape[0]
        copies = jnp.where(is_wanted & (table >= 0), table, pages).ravel()
        # What lies behind the last token of a page must stay zero.
        is_token = (jnp.arange(self.page_size) < rest)[:, None, None]
        put = lambda pool: pool.at[copies].set(jnp.where(is_token, pool[original], 0), mode="drop")
        return dataclasses.replace(after, key=put(after.key), value=put(after.value), table=table)

    def _store(self, key, value, position_bc, is_token_bc):
        # What an earlier append lacked is lost: a page for it now would hide that.
        is_new = self._is_needed(self.length) & ~self._is_needed(self.length - self.fresh)
        table = self._allocate(is_new & (self.table < 0))
        pages, size = self.key.shape[:2]
        b, chunk = position_bc.shape
        index = jnp.clip(position_bc // size, 0, table.shape[1] - 1)
        page_bc = jnp.take_along_axis(table, index, axis=1)
        is_kept = is_token_bc & (page_bc >= 0) & (position_bc < self.slots)
        beyond = pages * size + jnp.arange(b * chunk, dtype=jnp.int32).reshape(b, chunk)
        slots = jnp.where(is_kept, page_bc * size + position_bc % size, beyond).reshape(1, -1)
        put = lambda pool, new: write(
            pool.reshape(1, pages * size, *pool.shape[2:]),
            slots,
            new.reshape(1, b * chunk, *new.shape[2:]),
        ).reshape(pool.shape)
        return dataclasses.replace(
            self, key=put(self.key, key), value=put(self.value, value), table=table
        )

    def _allocate(self, is_wanted):
        """Return the table with a page in each of these entries for which one is left."""
        is_free = self.is_free()
        rank = (jnp.cumsum(is_wanted) - 1).reshape(is_wanted.shape)
        # The lowest free pages first.
        order = jnp.argsort(~is_free, stable=True).astype(jnp.int32)
        page = order[jnp.clip(rank, 0, len(order) - 1)]
        return jnp.where(is_wanted & (rank < is_free.sum()), page, self.table)

    def _is_needed(self, length):
        """Which entries of the table this many tokens need, bool `[b, most_pages]`."""
        first = jnp.arange(self.table.shape[1], dtype=jnp.int32) * self.page_size
        return first < length[:, None]

    def _check_room(self, lengths):
        super()._check_room(lengths)
        before, more = known(self.length), known(lengths)
        if before is None or more is None:
            return
        size = self.page_size
        self._check_free(
            sum(
                math.ceil((old + new) / size) - math.ceil(old / size)
                for old, new in zip(before, more, strict=True)
            )
        )

    def _check_free(self, needed):
        needed, free = known(needed), known(self.is_free())
        if needed is not None and free is not None and needed > sum(free):
            raise ValueError(
                f"{needed} more pages are needed, but {sum(free)} of {len(free)} are free: free "
                "finished examples, or make the cache with more pages"
            )

    def _check_share(self, source, tokens):
        for name, number in (("source", source), ("tokens", 0 if tokens is None else tokens)):
            if jnp.shape(number) or not jnp.issubdtype(jnp.result_type(number), jnp.integer):
                raise ValueError(f"{name} must be an integer, got {number!r}")
        example, lengths = known(source), known(self.length)
        if example is None:
            return
        if not 0 <= example < self.length.shape[0]:
            raise ValueError(
                f"source={example}: choose from 0 to {self.length.shape[0] - 1}, the examples"
            )
        count = None if tokens is None else known(tokens)
        if lengths is not None and count is not None and not 0 <= count <= lengths[example]:
            raise ValueError(
                f"tokens={count}: choose from 0 to {lengths[example]}, what example {example} has"
            )
