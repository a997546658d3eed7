# SPDX-License-Identifier: Apache-2.0
"""Attention to keys and values that stay in host memory.

    out, lse = merge of attention to tile 0, tile 1, ...

Keys and values go to the device tile by tile, the next ones while the present one is attended, and
are forgotten afterwards; the device holds the queries, the output so far and a few tiles. One
program serves all tiles. Inference only: there is no backward pass.

    >>> import jax
    >>> import numpy as np
    >>> from attnjax.ops import attention
    >>> from attnjax.parallel import streamed_attention
    >>> random = lambda seed: np.random.default_rng(seed).standard_normal((1, 64, 2, 8), np.float32)
    >>> q, k, v = random(0), random(1), random(2)
    >>> out = streamed_attention(q, k, v, tile=24)
    >>> out.shape, bool(np.allclose(out, jax.jit(attention)(q, k, v), atol=1e-5))
    ((1, 64, 2, 8), True)
"""

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import attention
from attnjax.ops.attention import (
    AttentionOutput,
    check_mask,
    check_normalizer,
    check_number,
    check_softcap,
)
from attnjax.ops.mask import EMPTY, Mask, Visibility
from attnjax.ops.mask.algebra import Lowered
from attnjax.ops.merge import merge_partials
from attnjax.ops.normalizer import EMPTY_LSE, SoftmaxFamily
from attnjax.typing import Array


def streamed_attention(
    query: Array,
    host_key: np.ndarray,
    host_value: np.ndarray,
    mask: Mask | Array | None = None,
    *,
    tile: int = 8192,
    prefetch: int = 2,
    scale: float | None = None,
    softcap: float | None = None,
    normalizer: str | SoftmaxFamily = "softmax",
    implementation: str | None = None,
    return_lse: bool = False,
) -> Array | AttentionOutput:
    """Attend as `ops.attention` does to keys and values in host memory; inference only.

    It runs on the host and starts one compiled step per tile: call it outside `jit` and `grad`. In
    low precision the outputs of tiles are rounded before they are merged.

    Args:
      query: `[b,t,n,h]` floating, on the device that is to attend.
      host_key: NumPy `[b,s,k,h]`, memory maps included, dtype of the query; `k` divides `n`.
      host_value: NumPy `[b,s,k,hv]`, dtype of the query.
      mask: as in `attention`. Tiles of keys that a mask known beforehand hides from all queries are
        never sent.
      tile: keys sent at a time.
      prefetch: tiles sent ahead of the one that is attended, at least 1.
      scale, softcap: as in `attention`.
      normalizer: softmax or a relative of it; its extra term is added once, at the end.
      implementation: of the core, on every tile.
      return_lse: also return the log-sum-exp.

    Returns:
      `out [b,t,n,hv]` in the dtype of the query, or an `AttentionOutput` with `lse [b,n,t]`.

    Raises:
      ValueError: an argument cannot mean anything, or is traced.
      NotImplementedError: the normalizer has no log-sum-exp.
    """
    _check_host(query, host_key, host_value, tile, prefetch)
    query = jnp.asarray(query)
    b, t, n, h = query.shape
    s, hv = host_key.shape[1], host_value.shape[3]
    normalizer = check_normalizer(normalizer)
    if not isinstance(normalizer, SoftmaxFamily):
        raise NotImplementedError(
            f"streamed_attention: {type(normalizer).__name__} has no log-sum-exp to merge by"
        )
    normalizer.check(n, h, hv)
    scale = h**-0.5 if scale is None else check_number("scale", scale)
    softcap = check_softcap(softcap)
    tile = min(tile, s)
    padded = math.ceil(s / tile) * tile
    visibility = check_mask(mask, b, n, t, s)
    seen = None
    starts = list(range(0, s, tile))
    if not visibility.is_full or padded != s:
        seen = visibility.pad(t, s, t, padded)
        starts = _visible_tiles(seen, t, padded, tile)
        seen = jax.tree.map(lambda x: jax.device_put(x, query.sharding), seen)

    def send(start):
        parts = (_cut(x, start, tile) for x in (host_key, host_value))
        return jax.device_put(tuple(parts), query.sharding)

    step = functools.partial(
        _step, query, seen, scale=scale, softcap=softcap, implementation=implementation, s=padded
    )
    wide = jnp.promote_types(query.dtype, jnp.float32)
    state = (jnp.zeros((b, t, n, hv), wide), jnp.full((b, n, t), EMPTY_LSE, wide))
    ahead = collections.deque(send(start) for start in starts[:prefetch])
    running: collections.deque = collections.deque()
    for i, start in enumerate(starts):
        state, done = step(state, *ahead.popleft(), np.int32(start))
        running.append(done)
        if i + prefetch < len(starts):
            # The host is faster than the device: without waiting it would send everything.
            if len(running) >= prefetch:
                running.popleft().block_until_ready()
            ahead.append(send(starts[i + prefetch]))
    out, lse = state
    if type(normalizer) is not SoftmaxFamily:
        finished = normalizer.finish(query, lse, scale, softcap)
        out, lse = finished.output(out), finished.lse
    out = out.astype(query.dtype)
    return AttentionOutput(out=out, lse=lse) if return_lse else out


@functools.partial(
    jax.jit, static_argnames=("scale", "softcap", "implementation", "s"), donate_argnames="state"
)
def _step(query, seen, state, key, value, start, *, scale, softcap, implementation, s):
    """Merge attention to one tile into the state; also return a number that exists afterwards."""
    mask, t, keys = None, query.shape[1], key.shape[1]
    if seen is not None:
        mask = Lowered(seen.window(0, t, start, keys, t, s))
    found = attention(
        query, key, value, mask=mask, scale=scale, softcap=softcap, implementation=implementation,
        return_lse=True,
    )  # fmt: skip
    out, lse = merge_partials([state, (found.out.astype(state[0].dtype), found.lse)])
    return (out, lse), start + keys


def _check_host(query, key, value, tile, prefetch):
    if isinstance(query, jax.core.Tracer):
        raise ValueError(
            "streamed_attention is for inference and runs on the host: call it outside jit, grad "
            "and vmap"
        )
    devices = getattr(query, "devices", lambda: ())()
    if len(devices) > 1:
        raise ValueError(f"query is on {len(devices)} devices: streamed_attention feeds one")
    for name, array in (("host_key", key), ("host_value", value)):
        if not isinstance(array, np.ndarray):
            raise ValueError(
                f"{name} must be a NumPy array in host memory, got {type(array).__name__}"
            )
    for name, number in (("tile", tile), ("prefetch", prefetch)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r}: must be a whole number of at least 1")
    shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    jax.eval_shape(attention, shape(query), shape(key), shape(value))


def _visible_tiles(seen: Visibility, t: int, s: int, tile: int) -> list[int]:
    """Return the starts of the tiles that some query may see, as far as that is known."""
    starts = list(range(0, s, tile))
    if not seen.is_static or seen.rest is not None:
        return starts
    kinds: Any = seen.block_map(t, s, t, tile)
    some = (kinds != EMPTY).any(axis=(0, 1, 2))
    return [start for start, is_seen in zip(starts, some, strict=True) if is_seen]


def _cut(array, start, tile):
    """Return a tile of the keys, filled up with zeros."""
    part = array[:, start : start + tile]
    if (missing := tile - part.shape[1]) == 0:
        return np.ascontiguousarray(part)
    return np.pad(part, ((0, 0), (0, missing), (0, 0), (0, 0)))
