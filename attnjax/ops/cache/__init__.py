# SPDX-License-Identifier: Apache-2.0
"""Caches of keys and values: values of static shape that grow token by token.

    >>> import functools, jax, jax.numpy as jnp
    >>> from attnjax.ops.cache import SinkWindowCache, append_and_attend
    >>> rotate = lambda x, positions: x * jnp.cos(positions)[..., None, None]  # Your RoPE here.
    >>> @functools.partial(jax.jit, donate_argnames="cache")
    ... def step(cache, x_btnh):  # Queries, keys and values of a layer; here all the same.
    ...     return append_and_attend(x_btnh, x_btnh, x_btnh, cache, rotate=rotate)
    >>> cache = SinkWindowCache.empty(batch=3, heads=2, width=8, sinks=4, window=16)
    >>> for x_btnh in jax.random.normal(jax.random.key(0), (100, 3, 1, 2, 8)):
    ...     out, cache = step(cache, x_btnh)
    >>> out.shape, cache.key.shape, cache.length.tolist()
    ((3, 1, 2, 8), (3, 20, 2, 8), [100, 100, 100])

A prompt is the same call with more tokens, examples of different lengths the same call with
`lengths`. A cache remembers how many tokens the last append gave each example, so that queries are
known to be the last of them. Everything that changes is data: one compilation serves all steps with
one number of queries.

Keys are stored as they come. Either rotate them before (the positions of new ones are
`cache.length[:, None] + arange(c)`), or store them as they are and give `rotate`: it is then
applied to all stored keys at every step, at the positions that the cache assigns.

An append that does not fit raises ValueError where lengths are known. In a compiled program they
are not: there the tokens are dropped, `overflowed` says which examples lost some, and whatever
these examples attend from then on is NaN.

Heads and, except for `PagedCache`, the batch may be sharded: appending and attending then need no
communication.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.attention import AttentionOutput, attention
from attnjax.ops.bias import Bias
from attnjax.ops.cache.paged import PagedCache
from attnjax.ops.cache.ring import POSITIONS, SinkWindowCache, WindowCache
from attnjax.ops.cache.state import MOST_TOKENS, Cache, FullCache, Rotate
from attnjax.ops.cache.storage import Quantisation, QuantisedArray
from attnjax.ops.decode import decode_attention
from attnjax.ops.mask import Mask
from attnjax.typing import Array

__all__ = [
    "MOST_TOKENS",
    "POSITIONS",
    "Cache",
    "FullCache",
    "PagedCache",
    "Quantisation",
    "QuantisedArray",
    "Rotate",
    "SinkWindowCache",
    "WindowCache",
    "append_and_attend",
    "attend_cached",
]

PIECEWISE_OPTIONS = ("scale", "softcap", "normalizer", "implementation", "splits")
"""What `append_and_attend` can pass on when it takes a chunk in pieces."""


def attend_cached(
    query: Array,
    cache: Cache,
    *,
    rotate: Rotate | None = None,
    mask: Mask | Array | None = None,
    splits: int | None = None,
    **options: Any,
) -> Array | AttentionOutput:
    """Attend the queries of the last tokens appended to everything the cache lets them see.

    Args:
      query: `[b,t,n,h]`; of an example with fewer fresh tokens than t the first rows count and the
        others give 0, of one with more the queries are those of the last t.
      cache: after appending the tokens of the queries.
      rotate: rotation of queries and of stored keys; None if both are rotated, or need not be.
      mask: more to hide, for t queries and the slots of the cache; see `Cache.key_positions`.
      splits: cut the keys into this many parts attended at the same time, see `decode_attention`.
      **options: as in `attention` (with splits: in `decode_attention`); biases must be arrays, and
        like `stop_gradient` and statistics of keys they are about slots.

    Returns:
      As `attention`, or `decode_attention` with splits. An example that has overflowed gives NaN.

    Raises:
      ValueError: more queries than the cache keeps keys for, or another argument cannot be meant.
      NotImplementedError: as in `attention`.
    """
    if query.ndim != 4 or query.shape[0] != cache.length.shape[0]:
        raise ValueError(
            f"query must be [b,t,n,h] with b={cache.length.shape[0]} as in the cache, got shape "
            f"{query.shape}"
        )
    queries, most = query.shape[1], cache.most_queries
    if most is not None and queries > most:
        raise ValueError(
            f"{queries} queries, but this {type(cache).__name__} keeps the keys for {most} at "
            f"once: use append_and_attend, or make the cache with chunk={queries}"
        )
    if isinstance(options.get("bias"), Bias):
        raise ValueError(
            f"{type(options['bias']).__name__} counts positions along the keys, but a cache has "
            "slots: make an array from query_positions and key_positions"
        )
    if "first_token_mass" in options.get("statistics", ()) and not cache.keeps_first:
        raise ValueError(f"first_token_mass: this {type(cache).__name__} forgets the first token")
    scale = options.pop("scale", None)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seen = cache.mask(queries)
    if mask is not None:
        seen = seen & masks.as_mask(mask)
    key, value = cache.contents(query.dtype)
    if rotate is not None:
        query, key = cache.turn(rotate, query, key, options.get("normalizer"))
    if splits is None:
        result = attention(query, key, value, mask=seen, scale=scale, **options)
    else:
        result = decode_attention(
            query, key, value, mask=seen, scale=scale, splits=splits, **options
        )
    overflowed = cache.overflowed()

    def spoil(leaf):
        lost = overflowed.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(lost, jnp.asarray(jnp.nan, leaf.dtype), leaf)

    return jax.tree.map(spoil, result)


def append_and_attend(
    query: Array,
    key: Array,
    value: Array,
    cache: Cache,
    *,
    lengths: Array | None = None,
    rotate: Rotate | None = None,
    **options: Any,
) -> tuple[Any, Cache]:
    """Append a chunk of any length and attend its queries: a step of decoding, or a prompt.

    A chunk longer than a ring serves at once is taken in pieces of its `chunk`, one after another.

    Args:
      query: `[b,c,n,h]`.
      key: `[b,c,k,h]`, not rotated if `rotate` is given.
      value: `[b,c,k,hv]`.
      cache: before the append.
      lengths: int `[b]`, how many of the c tokens each example really has, the first ones; all if
        None.
      rotate, **options: as in `attend_cached`; in pieces only those in `PIECEWISE_OPTIONS`.

    Returns:
      What `attend_cached` returns, 0 for tokens beyond the lengths, and the cache afterwards.

    Raises:
      ValueError: as `Cache.append` and `attend_cached`.
      NotImplementedError: as in `attention`, or an option that is not served in pieces.
    """
    chunk, most = query.shape[1], cache.most_queries
    if key.shape[1] != chunk:
        raise ValueError(f"{chunk} queries do not go with {key.shape[1]} keys")
    if most is None or chunk <= most:
        cache = cache.append(key, value, lengths)
        return attend_cached(query, cache, rotate=rotate, **options), cache
    for name in options:
        if name not in PIECEWISE_OPTIONS:
            raise NotImplementedError(
                f"append_and_attend: {chunk} tokens are taken in pieces of {most}, where {name} is "
                f"not served; choose from {list(PIECEWISE_OPTIONS)}, or make the cache with "
                f"chunk={chunk}"
            )
    lengths = cache.chunk_lengths(chunk, lengths)
    count = -(-chunk // most)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, count * most - chunk), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], count, most, *x.shape[2:]).swapaxes(0, 1)

    def step(cache, piece):
        index, query, key, value = piece
        cache = cache.append(key, value, jnp.clip(lengths - index * most, 0, most))
        return cache, attend_cached(query, cache, rotate=rotate, **options)

    pieces = (jnp.arange(count, dtype=jnp.int32), cut(query), cut(key), cut(value))
    cache, outs = jax.lax.scan(step, cache, pieces)
    out = outs.swapaxes(0, 1).reshape(query.shape[0], count * most, *outs.shape[3:])[:, :chunk]
    return out, dataclasses.replace(cache, fresh=lengths)
