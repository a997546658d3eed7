# SPDX-License-Identifier: Apache-2.0
"""What all caches share, and the cache that keeps everything."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.cache.storage import allocate, clear, read, write
from attnjax.ops.lengths import check_lengths, known
from attnjax.ops.mask import Mask
from attnjax.typing import Array

MOST_TOKENS = 2**31 - 1
"""Tokens that the int32 positions of one example can count."""

Rotate = Callable[[Array, Array], Array]
"""Takes `x [b,t,n,h]` and int32 positions `[b,t]` to rotated `[b,t,n,h]` of the same dtype."""


def register(*static: str):
    """Register a cache: `static` names the fields that are no arrays."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, data, list(static))

    return register


@dataclasses.dataclass(frozen=True)
class Cache(abc.ABC):
    """What all caches share. Make one with `empty` of its class; a cache is a pytree.

    Attributes:
      key: `[b,s,k,h]` in the dtype of the storage, or a `QuantisedArray` of that shape.
      value: `[b,s,k,hv]`, likewise.
      length: int32 `[b]`, tokens that each example has been given since it was empty.
      fresh: int32 `[b]`, how many of them came with the last append.
    """

    key: Any
    value: Any
    length: Array
    fresh: Array

    @property
    def slots(self) -> int:
        """Number of keys that `contents` returns for one example."""
        return self.key.shape[1]

    @property
    def most_tokens(self) -> int:
        """Tokens that an example may be given."""
        return MOST_TOKENS

    @property
    def most_queries(self) -> int | None:
        """Queries that may attend at once; None for any number."""
        return None

    @property
    def keeps_first(self) -> bool:
        """Whether the first token of a stream stays among the keys."""
        return True

    def append(self, key: Array, value: Array, lengths: Array | None = None) -> Self:
        """Return the cache with a chunk of tokens appended.

        Args:
          key: `[b,c,k,h]` floating, cast to the dtype of the storage.
          value: `[b,c,k,hv]` floating.
          lengths: int `[b]`, how many of the c tokens each example really has, the first ones;
            all if None. Traced lengths are clipped to [0, c].

        Raises:
          ValueError: shapes differ, a length is not in [0, c], or tokens do not fit.
        """
        self._check(key, value)
        lengths = self.chunk_lengths(key.shape[1], lengths)
        self._check_room(lengths)
        # Once the count has left int32 it stays negative, which `overflowed` reports.
        length = jnp.where(self.length < 0, self.length, self.length + lengths)
        after = dataclasses.replace(self, length=length, fresh=lengths)
        row = jnp.arange(key.shape[1], dtype=jnp.int32)
        return after._store(key, value, self.length[:, None] + row, row < lengths[:, None])

    def chunk_lengths(self, chunk: int, lengths: Array | None) -> Array:
        """Return checked lengths of a chunk, int32 `[b]`; see `append`."""
        b = self.length.shape[0]
        if lengths is None:
            return jnp.full((b,), chunk, jnp.int32)
        return jnp.clip(check_lengths(lengths, b, chunk, f"{chunk}, the tokens given"), 0, chunk)

    @abc.abstractmethod
    def _store(self, key, value, position_bc, is_token_bc) -> Self:
        """Write tokens at their positions; lengths are already those after the append."""

    @abc.abstractmethod
    def mask(self, queries: int) -> Mask:
        """Return who may attend whom, when the queries are those of the last tokens appended.

        Of an example with fewer fresh tokens than queries, the rows beyond see nothing; of one with
        more, the queries are the last of them. Queries are causal among themselves.

        Args:
          queries: their number.

        Returns:
          A `Mask` for this many queries and `slots` keys, known at run time.
        """

    def query_positions(self, queries: int) -> Array:
        """Return the positions of the queries for rotation, int32 `[b, queries]`."""
        return jnp.maximum(self.absolute_queries(queries)[0], 0)

    def key_positions(self, queries: int = 1) -> Array:
        """Return the positions of the stored keys for rotation, int32 `[b, slots]`.

        Args:
          queries: number of queries that will attend; where positions are places in the cache,
            they are chosen to suit these.
        """
        slot = jnp.arange(self.slots, dtype=jnp.int32)
        return jnp.broadcast_to(slot, (self.length.shape[0], self.slots))

    def absolute_queries(self, queries: int) -> tuple[Array, Array]:
        """Return positions in the stream `[b, queries]`, and whether there is such a query."""
        count = jnp.minimum(self.fresh, queries)[:, None]
        row = jnp.arange(queries, dtype=jnp.int32)
        return self.length[:, None] - count + row, row < count

    def contents(self, dtype: Any) -> tuple[Array, Array]:
        """Return keys `[b,slots,k,h]` and values `[b,slots,k,hv]` in a floating dtype."""
        return read(self.key, dtype), read(self.value, dtype)

    def turn(
        self, rotate: Rotate, query: Array, key: Array, normalizer: Any
    ) -> tuple[Array, Array]:
        """Return query and key, which is from `contents`, rotated for attending.

        Args:
          rotate: the rotation.
          query: `[b,t,n,h]`, of the last tokens appended.
          key: `[b,slots,k,h]`.
          normalizer: what attention will be called with.

        Returns:
          Arrays whose products are the scores; they may be wider than h.

        Raises:
          NotImplementedError: the normalizer cannot be served.
        """
        t = query.shape[1]
        return rotate(query, self.query_positions(t)), rotate(key, self.key_positions(t))

    def overflowed(self) -> Array:
        """Return bool `[b]`: whether an example was given tokens that did not fit."""
        return (self.length > self.most_tokens) | (self.length < 0)

    def free(self, examples: Array) -> Self:
        """Return the cache with some examples, bool `[b]`, emptied for other streams."""
        examples = self._check_examples(examples)
        return dataclasses.replace(
            self,
            key=clear(self.key, examples),
            value=clear(self.value, examples),
            length=jnp.where(examples, 0, self.length),
            fresh=jnp.where(examples, 0, self.fresh),
        )

    def _check(self, key, value):
        b = self.length.shape[0]
        for name, new, stored in (("key", key, self.key), ("value", value, self.value)):
            if new.ndim != 4 or new.shape[0] != b or new.shape[2:] != stored.shape[2:]:
                raise ValueError(
                    f"{name} must be [b,c,k,h] with b={b} and (k,h)={stored.shape[2:]} as in the "
                    f"cache, got shape {new.shape}"
                )
            if not jnp.issubdtype(new.dtype, jnp.floating):
                raise ValueError(f"{name} must be floating, got {new.dtype}")
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"{key.shape[1]} keys do not go with {value.shape[1]} values")

    def _check_room(self, lengths):
        before, more = known(self.length), known(lengths)
        if before is None or more is None:
            return
        for example, (old, new) in enumerate(zip(before, more, strict=True)):
            if new and not 0 <= old <= self.most_tokens - new:
                raise ValueError(
                    f"example {example} holds {old} tokens and would get {new} more: this "
                    f"{type(self).__name__} has room for {self.most_tokens}"
                )

    def _check_examples(self, examples):
        examples = jnp.asarray(examples)
        if examples.shape != self.length.shape or examples.dtype != bool:
            raise ValueError(
                f"examples must be bool [b] = {self.length.shape}, got {examples.dtype} "
                f"{examples.shape}"
            )
        return examples


class SlotCache(Cache):
    """A cache in which every example has slots of its own."""

    @abc.abstractmethod
    def _place(self, position_bc) -> tuple[Array, Array]:
        """Return the slots of positions, and whether these are to be written at all."""

    def _store(self, key, value, position_bc, is_token_bc):
        place_bc, is_kept_bc = self._place(position_bc)
        beyond = self.slots + jnp.arange(key.shape[1], dtype=jnp.int32)
        slots_bc = jnp.where(is_kept_bc & is_token_bc, place_bc, beyond)
        return dataclasses.replace(
            self,
            key=write(self.key, slots_bc, key),
            value=write(self.value, slots_bc, value),
        )


@register()
class FullCache(SlotCache):
    """Every token of the stream, up to a capacity; slot i holds the token at position i."""

    @classmethod
    def empty(
        cls,
        *,
        batch: int,
        heads: int,
        width: int,
        capacity: int,
        value_width: int | None = None,
        dtype: Any = jnp.float32,
    ) -> "FullCache":
        """Return a cache without tokens.

        Args:
          batch: number of examples b.
          heads: number of key/value heads k.
          width: head width h.
          capacity: most tokens of an example.
          value_width: width of values, if it differs.
          dtype: of the storage; a floating dtype or a `Quantisation`, or a pair for keys and
            values.

        Raises:
          ValueError: a size is not positive, or a dtype does not fit.
        """
        check_positive(capacity=capacity)
        return cls(**empty_arrays(batch, batch, capacity, heads, width, value_width, dtype))

    @property
    def most_tokens(self) -> int:
        return self.slots

    def mask(self, queries: int) -> Mask:
        return causal_mask(self, queries)

    def _place(self, position_bc):
        return position_bc, position_bc < self.slots


def causal_mask(cache: Cache, queries: int) -> Mask:
    """Return the mask of a cache whose slots are positions in the stream; see `Cache.mask`."""
    position, exists = cache.absolute_queries(queries)
    upper = jnp.where(exists, jnp.minimum(position + 1, cache.slots), 0)[:, None, None]
    return masks.ranges(jnp.zeros_like(upper), upper)


def empty_arrays(
    batch: int,
    rows: int,
    slots: int,
    heads: int,
    width: int,
    value_width: int | None,
    dtype: Any,
) -> Mapping[str, Any]:
    """Return the arrays of a cache without tokens, by the name of their field.

    Args:
      batch: number of examples.
      rows: size of the first axis of keys and values.
      slots: size of the second.
      heads, width, value_width, dtype: see `FullCache.empty`.

    Raises:
      ValueError: a size is not positive, or a dtype does not fit.
    """
    value_width = width if value_width is None else value_width
    check_positive(batch=batch, heads=heads, width=width, value_width=value_width)
    key_dtype, value_dtype = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    return {
        "key": allocate((rows, slots, heads, width), key_dtype),
        "value": allocate((rows, slots, heads, value_width), value_dtype),
        # Two arrays, because a buffer may be donated only once.
        "length": jnp.zeros((batch,), jnp.int32),
        "fresh": jnp.zeros((batch,), jnp.int32),
    }


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: must be at least 1")
