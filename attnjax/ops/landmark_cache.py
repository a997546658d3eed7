# SPDX-License-Identifier: Apache-2.0
"""Landmark attention over a cache of blocks, of which every query retrieves a few.

Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300, Section 3.2. For tokens of a chunk,

    choose   the k cached blocks with the highest softmax over cached landmarks, by token, by head,
             or by both
    attend   to softmax over {own tokens, landmarks of local blocks, landmarks of chosen blocks},
             the value of a landmark being attention inside its block

With a context-miss token the chosen blocks are what it decides on, see `ops.grouped.ContextMiss`.

Keys are kept as they were before rotation: a block stands at another place whenever it is looked
at, see `ops.landmark_tape`. Which blocks are chosen has no gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.landmark import landmark_attention, merge_missed, miss_score
from attnjax.ops.landmark_tape import cached_slots, chunk_start, retrieved_slots
from attnjax.ops.merge import merge_partials
from attnjax.ops.normalizer import EMPTY_LSE, softmax
from attnjax.typing import Array

RETRIEVALS = ("per_token_and_head", "max_over_heads", "max_over_tokens")
"""Blocks for every token and head; for every token; or for every head of a chunk."""

Rotate = Callable[[Array, Array], Array]
"""(x `[b,t,n,h]`, positions `[b,t]`) -> x turned."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
    """A ring of complete blocks and the last, incomplete one.

    Attributes:
      key: `[b, capacity, l + 1, k, h]`, not rotated; the last slot of a block is its landmark.
      value: `[b, capacity, l + 1, k, hv]`.
      count: int32 scalar, blocks that were ever added; block i lies at i modulo capacity.
      tail_key: `[b, r, k, h]`, the incomplete block, r <= l.
      tail_value: `[b, r, k, hv]`.
    """

    key: Array
    value: Array
    count: Array
    tail_key: Array
    tail_value: Array

    @classmethod
    def empty(
        cls, batch: int, capacity: int, block: int, heads: int, width: int, *,
        value_width: int | None = None, dtype: object = jnp.float32,
    ) -> "BlockCache":  # fmt: skip
        """Return a cache without tokens.

        Args:
          batch: b.
          capacity: most blocks that are kept, the latest ones.
          block: l + 1, slots of a block.
          heads, width: key/value heads k and their width h.
          value_width: hv; h if None.
          dtype: of the storage.

        Raises:
          ValueError: a size is not positive, or a block has no normal token.
        """
        sizes = {"batch": batch, "capacity": capacity, "heads": heads, "width": width}
        for name, size in (*sizes.items(), ("block - 1", block - 1)):
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1")
        wide = width if value_width is None else value_width
        zeros = lambda *shape: jnp.zeros((batch, *shape), dtype)
        return cls(
            key=zeros(capacity, block, heads, width),
            value=zeros(capacity, block, heads, wide),
            count=jnp.zeros((), jnp.int32),
            tail_key=zeros(0, heads, width),
            tail_value=zeros(0, heads, wide),
        )

    @property
    def capacity(self) -> int:
        """Most blocks that are kept."""
        return self.key.shape[1]

    @property
    def block(self) -> int:
        """l + 1, slots of a block."""
        return self.key.shape[2]

    @property
    def phase(self) -> int:
        """Slots of the incomplete block."""
        return self.tail_key.shape[1]

    @property
    def cached(self) -> Array:
        """Blocks that are kept, int32 scalar."""
        return jnp.minimum(self.count, self.capacity)

    def ages(self) -> tuple[Array, Array]:
        """Return the age of the block at every place, 0 for the latest, and whether there is one.

        Returns:
          int32 and bool `[capacity]`.
        """
        place = jnp.arange(self.capacity)
        age = (self.count - 1 - place) % self.capacity
        return age, age < self.cached

    def append(self, key: Array, value: Array) -> Self:
        """Add slots of a tape; blocks that become complete push out the oldest ones.

        Args:
          key: `[b, m, k, h]`, not rotated, landmarks in their slots.
          value: `[b, m, k, hv]`.
        """
        key = jnp.concatenate([self.tail_key, key.astype(self.tail_key.dtype)], axis=1)
        value = jnp.concatenate([self.tail_value, value.astype(self.tail_value.dtype)], axis=1)
        full, cut = divmod(key.shape[1], self.block)
        end = full * self.block
        kept = min(full, self.capacity)
        place = (self.count + full - kept + jnp.arange(kept)) % self.capacity
        cut = lambda x: x[:, end - kept * self.block : end].reshape(
            x.shape[0], kept, self.block, *x.shape[2:]
        )
        return dataclasses.replace(
            self,
            key=self.key.at[:, place].set(cut(key)),
            value=self.value.at[:, place].set(cut(value)),
            count=self.count + full,
            tail_key=key[:, end:],
            tail_value=value[:, end:],
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Retrieval:
    """What the queries of a chunk looked into.

    Attributes:
      blocks: int32 `[b, n|1, m|1, k]`, the blocks of every query, numbered as they were added, the
        oldest first; -1 where there was none.
      miss_share: float32 `[b,n,m]`, the context-miss token's share before the cutoff; None without
        one.
    """

    blocks: Array
    miss_share: Array | None = None


def choose_blocks(
    query: Array,
    landmarks: Array,
    ages: Array,
    valid: Array,
    *,
    top_k: int,
    block: int,
    retrieval: str,
    rotate: Rotate,
    scale: float,
) -> tuple[Array, Array]:
    """Choose the cached blocks that the tokens of a chunk attend to.

    Args:
      query: `[b,m,n,h]`, rotated.
      landmarks: `[b,c,k,h]`, keys of the landmarks of c cached blocks, not rotated.
      ages: int `[c]`, 0 for the latest block.
      valid: bool `[c]`, whether there is a block.
      top_k: k, how many are chosen; clamped to c.
      block: l + 1, slots of a block.
      retrieval: member of `RETRIEVALS`.
      rotate: turns keys to their positions.
      scale: factor of the scores.

    Returns:
      Places among the c `[b, n|1, m|1, k]` int32, oldest block first, and whether each holds a
      block, bool of the same shape; those that do not come last.

    Raises:
      ValueError: there is no such retrieval.
    """
    if retrieval not in RETRIEVALS:
        raise ValueError(f"retrieval={retrieval!r}: must be one of {', '.join(RETRIEVALS)}")
    (b, m, n, h), (c, k) = query.shape, landmarks.shape[1:3]
    positions_c = cached_slots(ages, valid.sum(), top_k) * block + block - 1
    key_bckh = rotate(landmarks, jnp.broadcast_to(positions_c, (b, c)))
    scores_bnmc = scale * jnp.einsum(
        "bmkgh,bckh->bkgmc", query.reshape(b, m, k, n // k, h), key_bckh,
        preferred_element_type=jnp.float32,
    ).reshape(b, n, m, c)  # fmt: skip
    share_bnmc, _ = softmax(jax.lax.stop_gradient(scores_bnmc), valid)
    share_bnmc = jnp.where(valid, share_bnmc, -1.0)
    if retrieval == "max_over_heads":
        share_bnmc = share_bnmc.max(axis=1, keepdims=True)
    if retrieval == "max_over_tokens":
        share_bnmc = share_bnmc.max(axis=2, keepdims=True)
    share, place = jax.lax.top_k(share_bnmc, min(top_k, c))
    is_block = share >= 0
    # Oldest first; what is no block goes to the end.
    order = jnp.argsort(jnp.where(is_block, -ages[place], 1), axis=-1, stable=True)
    take = lambda x: jnp.take_along_axis(x, order, axis=-1)
    return take(place).astype(jnp.int32), take(is_block)


def attend_blocks(
    query: Array,
    key: Array,
    value: Array,
    slots: Array,
    valid: Array,
    *,
    rotate: Rotate,
    scale: float,
) -> tuple[Array, Array]:
    """Attend to retrieved blocks through their landmarks.

    Args:
      query: `[b,m,n,h]`, rotated.
      key: `[b, n, m|1, k, l + 1, h]`, blocks for every head and token, not rotated.
      value: `[b, n, m|1, k, l + 1, hv]`.
      slots: int `[b, n|1, m|1, k]`, where they stand, counted in blocks.
      valid: bool, likewise, whether there is a block.
      rotate: turns keys to their positions.
      scale: factor of the scores.

    Returns:
      `out [b,m,n,hv]` float32 and log-sum-exp of the landmarks' scores `[b,n,m]`, to be merged with
      local attention.
    """
    b, n, w, k, block, h = key.shape
    position = slots[..., None] * block + jnp.arange(block)
    position = jnp.broadcast_to(position, (b, n, w, k, block)).reshape(b * n * w, k * block)
    key = rotate(key.reshape(b * n * w, k * block, 1, h), position).reshape(key.shape)
    # Blocks of all tokens alike need no axis of tokens.
    is_shared = w == 1
    own = "bnkp" if is_shared else "bnmkp"
    if is_shared:
        key, value = key[:, :, 0], value[:, :, 0]
    scores_bnmkp = scale * jnp.einsum(
        f"bmnh,{own}h->bnmkp", query, key, preferred_element_type=jnp.float32
    )
    weights, _ = softmax(scores_bnmkp[..., :-1])
    gate, lse_bnm = softmax(jnp.where(valid, scores_bnmkp[..., -1], -jnp.inf))
    out_bmnh = jnp.einsum(
        f"bnmkp,{own}h->bmnh", weights * gate[..., None], value[..., :-1, :].astype(jnp.float32)
    )
    return out_bmnh, lse_bnm


def attend_local(
    query: Array, key: Array, value: Array, tail: tuple[Array, Array], start: Array | int,
    *, block: int, rotate: Rotate, scale: float,
) -> tuple[Array, tuple[Array, Array], tuple[Array, Array]]:  # fmt: skip
    """Attend to the incomplete block and the chunk behind it.

    Args:
      query: `[b,m,n,h]`, not rotated.
      key: `[b,m,k,h]`, not rotated.
      value: `[b,m,k,hv]`.
      tail: keys and values of the incomplete block.
      start: position of its first slot.
      block: l + 1, slots of a block.
      rotate: turns queries and keys to positions.
      scale: factor of the scores.

    Returns:
      The rotated query; `out [b,m,n,hv]` float32 with its log-sum-exp; and keys and values of both
      together, not rotated.
    """
    key = jnp.concatenate([tail[0].astype(key.dtype), key], axis=1)
    value = jnp.concatenate([tail[1].astype(value.dtype), value], axis=1)
    positions = jnp.broadcast_to(start + jnp.arange(key.shape[1]), key.shape[:2])
    turned = rotate(query, positions[:, tail[0].shape[1] :])
    out, lse = landmark_attention(
        turned, rotate(key, positions), value, block=block, scale=scale, return_lse=True
    )
    return turned, (out.astype(jnp.float32), lse), (key, value)


def read_chunk(
    query: Array,
    key: Array,
    value: Array,
    cache: BlockCache,
    *,
    top_k: int,
    retrieval: str = "per_token_and_head",
    rotate: Rotate,
    scale: float | None = None,
    miss_key: Array | None = None,
    miss_cutoff: float = 0.0,
) -> tuple[Array, BlockCache, Retrieval]:
    """Attend from a chunk of a tape to retrieved blocks and to itself, and remember it.

    Args:
      query: `[b,m,n,h]`, not rotated, landmarks in their slots; the tape goes on where the cache
        ended.
      key: `[b,m,k,h]`, not rotated.
      value: `[b,m,k,hv]`.
      cache: what was read before.
      top_k: blocks that are retrieved; 0: none.
      retrieval: member of `RETRIEVALS`.
      rotate: turns queries and keys to positions `[b,t]`.
      scale: factor of the scores; `h ** -0.5` if None.
      miss_key: `[b|1, 1, k, h]`, key of a context-miss token, not rotated: it decides whether the
        retrieved blocks count. None: there is none.
      miss_cutoff: with a smaller share of the token they do not count at all.

    Returns:
      `[b,m,n,hv]` in the dtype of the query, the cache afterwards, and what was looked into.

    Raises:
      ValueError: a number or name is out of range.
    """
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: must be at least 0")
    (n, h), heads = query.shape[2:], key.shape[2]
    scale = h**-0.5 if scale is None else scale
    start = chunk_start(cache.cached, top_k, cache.block)
    turned, local, _ = attend_local(
        query, key, value, (cache.tail_key, cache.tail_value), start,
        block=cache.block, rotate=rotate, scale=scale,
    )  # fmt: skip
    blocks, retrieved = jnp.zeros((query.shape[0], 1, 1, 0), jnp.int32), None
    if top_k:
        ages, valid = cache.ages()
        place, is_block = choose_blocks(
            turned, cache.key[:, :, -1].astype(query.dtype), ages, valid,
            top_k=top_k, block=cache.block, retrieval=retrieval, rotate=rotate, scale=scale,
        )  # fmt: skip
        slots = retrieved_slots(ages[place], cache.cached, top_k)
        blocks = jnp.where(is_block, cache.count - 1 - ages[place], -1)
        gather = lambda x: _gather(x, place, n // heads, n)
        retrieved = attend_blocks(
            turned, gather(cache.key).astype(query.dtype), gather(cache.value), slots, is_block,
            rotate=rotate, scale=scale,
        )  # fmt: skip
    out, share = _merge(turned, local, retrieved, miss_key, miss_cutoff, rotate, scale)
    return out.astype(query.dtype), cache.append(key, value), Retrieval(blocks, share)


def _merge(turned, local, retrieved, miss_key, cutoff, rotate, scale):
    if miss_key is None:
        parts = [local] if retrieved is None else [local, retrieved]
        return merge_partials(parts)[0], None
    if retrieved is None:
        out, lse = local
        retrieved = jnp.zeros_like(out), jnp.full_like(lse, EMPTY_LSE)
    first = jnp.full((miss_key.shape[0], 1), -1, jnp.int32)
    score = miss_score(turned, rotate(miss_key.astype(turned.dtype), first), scale)
    return merge_missed(local, retrieved, score, cutoff)


def _gather(blocks, place, group, n):
    """Pick `[b, n, m|1, k, l + 1, h]` of `blocks [b, c, l + 1, heads, h]` by `place`."""
    b = blocks.shape[0]
    place = jnp.broadcast_to(place, (b, n, *place.shape[2:]))
    head = (jnp.arange(n) // group)[:, None, None]
    return blocks[jnp.arange(b)[:, None, None, None], place, :, head[None]]


class HostBlocks:
    """Blocks in the memory of the host; devices keep only the landmarks' keys.

    For "max_over_tokens", where a chunk needs k blocks per head and no more. A plain driver: call
    `read` chunk by chunk, outside jit. What it computes is what `read_chunk` computes.
    """

    def __init__(self, batch: int, capacity: int, block: int, heads: int, width: int):
        """Start without blocks; arguments as in `BlockCache.empty`, float32."""
        empty = BlockCache.empty(batch, capacity, block, heads, width)
        self._key, self._value = np.array(empty.key), np.array(empty.value)
        self._landmarks = empty.key[:, :, -1]
        self._tail = (empty.tail_key, empty.tail_value)
        self._count = 0

    def device_bytes(self) -> int:
        """Return what is kept on the device between chunks."""
        return sum(x.nbytes for x in (self._landmarks, *self._tail))

    def read(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        top_k: int,
        rotate: Rotate,
        miss_key: Array | None = None,
        miss_cutoff: float = 0.0,
    ) -> tuple[Array, Retrieval]:
        """Attend from a chunk and remember it; arguments and results as in `read_chunk`."""
        (b, capacity, block, heads, h), n = self._key.shape, query.shape[2]
        scale, cached = h**-0.5, min(self._count, capacity)
        turned, local, (local_key, local_value) = attend_local(
            query, key, value, self._tail, chunk_start(cached, top_k, block),
            block=block, rotate=rotate, scale=scale,
        )  # fmt: skip
        blocks, retrieved = jnp.full((b, n, 1, min(top_k, capacity)), -1, jnp.int32), None
        if cached and top_k:
            ages = (self._count - 1 - np.arange(capacity)) % capacity
            place, is_block = choose_blocks(
                turned, self._landmarks, jnp.asarray(ages), jnp.asarray(ages < cached),
                top_k=top_k, block=block, retrieval="max_over_tokens", rotate=rotate, scale=scale,
            )  # fmt: skip
            chosen = np.asarray(place)
            slots = retrieved_slots(ages[chosen], cached, top_k)
            blocks = jnp.where(is_block, self._count - 1 - ages[chosen], -1)
            example, head = np.arange(b)[:, None, None, None], np.arange(n) // (n // heads)
            pick = lambda x: jnp.asarray(x[example, chosen, :, head[None, :, None, None]])
            retrieved = attend_blocks(
                turned, pick(self._key), pick(self._value), jnp.asarray(slots), is_block,
                rotate=rotate, scale=scale,
            )  # fmt: skip
        self._append(local_key, local_value)
        out, share = _merge(turned, local, retrieved, miss_key, miss_cutoff, rotate, scale)
        return out.astype(query.dtype), Retrieval(blocks, share)

    def _append(self, key, value):
        block, capacity = self._key.shape[2], self._key.shape[1]
        full = key.shape[1] // block
        for index in range(full):
            place = self._count % capacity
            part = slice(index * block, (index + 1) * block)
            self._key[:, place] = key[:, part]
            self._value[:, place] = value[:, part]
            self._landmarks = self._landmarks.at[:, place].set(key[:, part.stop - 1])
            self._count += 1
        self._tail = (key[:, full * block :], value[:, full * block :])
