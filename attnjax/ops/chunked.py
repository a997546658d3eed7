# SPDX-License-Identifier: Apache-2.0
"""Online-softmax attention in plain XLA: the scores exist one tile at a time.

Forward, over the tiles of keys of one tile of queries, with running maximum m and sum l:

    m' = max(m, max_s scores)      p = exp(scores - m')      l' = exp(m - m') l + sum_s p
    acc' = exp(m - m') acc + p . value                       out = acc / l, lse = m + log l

Backward, from (out, lse) alone, recomputing every tile:

    p = exp(scores - lse)          dscores = p * (dout . value - sum_h(dout out) + dlse)

Temporary memory is linear in both lengths. Reverse mode works to any order (the second order
differentiates these loops and stores their steps). Forward mode is refused by JAX, as for every
function with its own backward pass: `implementation="reference"` serves it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attnjax.ops.attention import AttentionOutput, Call
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.reference import dropout_factor, dropout_seed
from attnjax.typing import Array

# Scores in a tile on CPU. Above the first they fall out of the cache; below the second the loop
# costs more than it saves. Measured on two cores with 1 MiB of L2 and 32 MiB of L3 cache.
LARGE_TILE = 2**20
SMALL_TILE = 2**17


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How many examples, queries and keys a tile of scores spans (always all heads)."""

    examples: int
    queries: int
    keys: int


def attend(call: Call, tiles: Tiles | None = None) -> AttentionOutput:
    """Serve a call tile by tile.

    Args:
      call: the checked arguments.
      tiles: tile sizes, for tests and tuning; the examples must divide the batch. Chosen from the
        shapes if None.

    Returns:
      An `AttentionOutput` without probabilities.

    Raises:
      NotImplementedError: the call asks for probabilities or for a normalizer that is not softmax.
    """
    call.refuse(
        "chunked", "normalizer", "bias objects", "return_probabilities", "return_scores",
        "statistics", "edit",
    )  # fmt: skip
    b, n, t, s = call.scores_shape
    if b == 0:
        raise NotImplementedError("chunked: an empty batch is not served")
    plan = _Plan(
        tiles=tiles or choose_tiles(b, n, t, s),
        scores_shape=(b, n, t, s),
        key_heads=call.key.shape[2],
        scale=call.scale,
        softcap=call.softcap,
        dropout_rate=call.dropout_rate,
    )
    seed = dropout_seed(call.dropout_key) if call.dropout_rate else None
    mask = None if call.visibility.is_full else jnp.asarray(call.visibility.dense(t, s))
    out, lse = _attend_jit(plan, call.query, call.key, call.value, call.bias, mask, seed)
    return AttentionOutput(out=out, lse=lse if call.return_lse else None)


def choose_tiles(b: int, n: int, t: int, s: int) -> Tiles:
    """Choose tile sizes for scores of shape `(b, n, t, s)`.

    On CPU a tile of scores should stay in the cache, so few examples share one, or only one per
    device of the ambient mesh. An accelerator wants wide steps: all examples at once.
    """
    keys = s if s <= 1024 else _even(s, 512)
    examples, queries = b, _even(t, 256)
    if jax.default_backend() == "cpu":
        queries = _even(t, max(64, LARGE_TILE // (n * keys)))
        devices = _ambient_devices()
        shards = devices if b % devices == 0 else 1
        for examples in range(shards, b + 1, shards):
            if b % examples == 0 and examples // shards * n * queries * keys >= SMALL_TILE:
                break
    return Tiles(examples, queries, keys)


def _even(size: int, limit: int) -> int:
    """Return the size of equal parts of an axis, none above the limit."""
    return math.ceil(size / math.ceil(size / limit))


def _ambient_devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The compiled-in part of a call, and how its arrays are cut into tiles.

    Examples are cut with a stride (tile i holds examples i, i + count, ...), so that a batch axis
    sharded over devices stays whole on every device while a loop runs over the tiles.
    """

    tiles: Tiles
    scores_shape: tuple[int, int, int, int]
    key_heads: int
    scale: float
    softcap: float | None
    dropout_rate: float

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of tiles along examples, queries and keys."""
        b, _, t, s = self.scores_shape
        tiles = self.tiles
        return b // tiles.examples, math.ceil(t / tiles.queries), math.ceil(s / tiles.keys)

    def split_query(self, array_btnh: Array) -> Array:
        """Cut `[b,t,n,h]` into `[bt,i,j,tq,k,g,h]`: (in tile, tile) of examples, of queries."""
        b, _, n, h = array_btnh.shape
        i, j, _ = self.counts
        array = _pad(array_btnh, 1, j * self.tiles.queries)
        heads = (self.key_heads, n // self.key_heads)
        return array.reshape(b // i, i, j, self.tiles.queries, *heads, h)

    def split_key(self, array_bskh: Array) -> Array:
        """Cut `[b,s,k,h]` into `[bt,i,m,ts,k,h]`."""
        b, _, k, h = array_bskh.shape
        i, _, m = self.counts
        array = _pad(array_bskh, 1, m * self.tiles.keys)
        return array.reshape(b // i, i, m, self.tiles.keys, k, h)

    def split_scores(self, array_bnts: Array) -> Array:
        """Cut a mask or bias into `[bt,i,k,g,j,tq,m,ts]`; broadcast axes stay of size 1."""
        b, n, t, s = array_bnts.shape
        i, j, m = self.counts
        shape = (b // i, i) if b > 1 else (1, 1)
        shape += (self.key_heads, n // self.key_heads) if n > 1 else (1, 1)
        shape += (j, self.tiles.queries) if t > 1 else (1, 1)
        shape += (m, self.tiles.keys) if s > 1 else (1, 1)
        array = _pad(array_bnts, 2, shape[4] * shape[5])
        return _pad(array, 3, shape[6] * shape[7]).reshape(shape)

    def join_query(self, array_ijbtkgh: Array) -> Array:
        """Undo `split_query` for results stacked by the loops over i and j."""
        b, n, t, _ = self.scores_shape
        array = jnp.einsum("ijbtkgh->bijtkgh", array_ijbtkgh)
        return array.reshape(b, -1, n, array.shape[-1])[:, :t]

    def join_key(self, array_ibmskh: Array) -> Array:
        """Undo `split_key` for results stacked by the loop over i."""
        b, _, _, s = self.scores_shape
        array = jnp.einsum("ibmskh->bimskh", array_ibmskh)
        return array.reshape(b, -1, *array.shape[-2:])[:, :s]

    def join_scores(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Undo `split_scores` for an array whose own shape was `shape`."""
        padded = array.reshape(*shape[:2], math.prod(array.shape[4:6]), math.prod(array.shape[6:]))
        return padded[:, :, : shape[2], : shape[3]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, bias, mask, seed):
    return _forward(plan, query, key, value, bias, mask, seed)[0]


def _forward(plan, query, key, value, bias, mask, seed):
    wide = jnp.promote_types(query.dtype, jnp.float32)
    example_count, query_count, key_count = plan.counts
    query_all, key_all, value_all = (
        plan.split_query(query), plan.split_key(key), plan.split_key(value),
    )  # fmt: skip
    bias_all, mask_all = (None if a is None else plan.split_scores(a) for a in (bias, mask))

    def example_step(_, i):
        query_b, key_b, value_b = (_at(a, i, 1) for a in (query_all, key_all, value_all))

        def query_step(_, j):
            query_btkgh = _at(query_b, j, 1)

            def key_step(state, m):
                top, total, sum_bkgth = state
                value_bskh = _at(value_b, m, 1)
                scores_bkgts, _ = _scores(
                    plan, query_btkgh, _at(key_b, m, 1), bias_all, mask_all, (i, j, m)
                )
                # The maximum cancels in the result: no gradient, and finite for empty rows.
                new_top = jax.lax.stop_gradient(
                    jnp.maximum(top, scores_bkgts.max(axis=-1, keepdims=True))
                )
                shrink = jnp.exp(top - new_top)
                weights_bkgts = jnp.exp(scores_bkgts - new_top)
                total = shrink * total + weights_bkgts.sum(axis=-1, keepdims=True)
                if plan.dropout_rate:
                    weights_bkgts = weights_bkgts * _dropout(plan, seed, (i, j, m)).astype(wide)
                step_bkgth = _einsum("bkgts,bskh->bkgth", weights_bkgts, value_bskh)
                return (new_top, total, shrink * sum_bkgth + step_bkgth), None

            bt, tq, k, g, _ = query_btkgh.shape
            start = (
                jnp.full((bt, k, g, tq, 1), EMPTY_LSE, wide),
                jnp.zeros((bt, k, g, tq, 1), wide),
                jnp.zeros((bt, k, g, tq, value.shape[-1]), wide),
            )
            (top, total, sum_bkgth), _ = _loop(key_count, key_step, start)
            is_empty = total == 0
            total = jnp.where(is_empty, 1, total)
            lse_bkgth = jnp.where(is_empty, EMPTY_LSE, top + jnp.log(total))
            out_bkgth = (sum_bkgth / total).astype(query.dtype)
            return None, tuple(jnp.einsum("bkgth->btkgh", a) for a in (out_bkgth, lse_bkgth))

        return None, _loop(query_count, query_step, None)[1]

    _, results = _loop(example_count, example_step, None)
    out, lse_btnh = (plan.join_query(array) for array in results)
    lse = lse_btnh[..., 0].swapaxes(1, 2)
    return (out, lse), (query, key, value, bias, mask, seed, out, lse)


def _backward(plan, saved, cotangents):
    query, key, value, bias, mask, seed, out, lse = saved
    dout, dlse = cotangents
    wide = jnp.promote_types(query.dtype, jnp.float32)
    example_count, query_count, key_count = plan.counts
    key_all, value_all = plan.split_key(key), plan.split_key(value)
    bias_all, mask_all = (None if a is None else plan.split_scores(a) for a in (bias, mask))
    # dscores = p * (dweights - shift): sum_s(p * dweights) equals dout . out, which is cheap.
    shift_btn = (dout.astype(wide) * out.astype(wide)).sum(axis=-1) - dlse.swapaxes(1, 2)
    by_query = (query, dout, shift_btn[..., None], lse.swapaxes(1, 2)[..., None])
    by_query = tuple(plan.split_query(array) for array in by_query)

    def example_step(dbias, i):
        key_b, value_b = _at(key_all, i, 1), _at(value_all, i, 1)
        by_query_b = tuple(_at(array, i, 1) for array in by_query)

        def query_step(state, j):
            query_btkgh, dout_btkgh, *columns = (_at(array, j, 1) for array in by_query_b)
            shift, lse_tile = (jnp.einsum("btkgh->bkgth", column) for column in columns)

            def key_step(state, m):
                dquery, dkey, dvalue, dbias = state
                key_bskh, value_bskh = _at(key_b, m, 1), _at(value_b, m, 1)
                scores_bkgts, slope = _scores(
                    plan, query_btkgh, key_bskh, bias_all, mask_all, (i, j, m)
                )
                weights = jnp.exp(scores_bkgts - lse_tile)
                dweights = _einsum("btkgh,bskh->bkgts", dout_btkgh, value_bskh)
                kept = weights
                if plan.dropout_rate:
                    factor = _dropout(plan, seed, (i, j, m)).astype(wide)
                    kept, dweights = kept * factor, dweights * factor
                dscores = weights * (dweights - shift)
                if dbias is not None:
                    dbias = _add_scores(dbias, dscores, (i, j, m))
                dproduct = dscores * slope
                dquery = dquery + _einsum("bkgts,bskh->btkgh", dproduct, key_bskh)
                dkey = _add_at(dkey, _einsum("bkgts,btkgh->bskh", dproduct, query_btkgh), m)
                dvalue = _add_at(dvalue, _einsum("bkgts,btkgh->bskh", kept, dout_btkgh), m)
                return (dquery, dkey, dvalue, dbias), None

            start = (jnp.zeros(query_btkgh.shape, wide), *state)
            (dquery, *state), _ = _loop(key_count, key_step, start)
            return tuple(state), dquery.astype(query.dtype)

        start = (jnp.zeros(key_b.shape, wide), jnp.zeros(value_b.shape, wide), dbias)
        (dkey, dvalue, dbias), dquery = _loop(query_count, query_step, start)
        return dbias, (dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype))

    start = None if bias is None else jnp.zeros(bias_all.shape, wide)
    dbias, (dquery, dkey, dvalue) = _loop(example_count, example_step, start)
    if bias is not None:
        dbias = plan.join_scores(dbias, bias.shape).astype(bias.dtype)
    return plan.join_query(dquery), plan.join_key(dkey), plan.join_key(dvalue), dbias, None, None


_attend.defvjp(_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=0)


def _scores(plan, query_btkgh, key_bskh, bias_all, mask_all, tile):
    """Return the scores of a tile `[b,k,g,t,s]` and their derivative by `query . key`."""
    scores_bkgts = plan.scale * _einsum("btkgh,bskh->bkgts", query_btkgh, key_bskh)
    slope = plan.scale
    if plan.softcap is not None:
        bend = jnp.tanh(scores_bkgts / plan.softcap)
        scores_bkgts, slope = plan.softcap * bend, plan.scale * (1 - bend * bend)
    if bias_all is not None:
        scores_bkgts = scores_bkgts + _take_scores(bias_all, tile).astype(scores_bkgts.dtype)
    if mask_all is not None:
        scores_bkgts = jnp.where(_take_scores(mask_all, tile), scores_bkgts, -jnp.inf)
    keys, key_tile = plan.scores_shape[3], plan.tiles.keys
    if keys % key_tile:
        is_real = tile[2] * key_tile + jnp.arange(key_tile) < keys
        scores_bkgts = jnp.where(is_real.reshape(1, 1, 1, 1, -1), scores_bkgts, -jnp.inf)
    return scores_bkgts, slope


def _dropout(plan, seed, tile):
    """Return the dropout factors of a tile `[b,k,g,t,s]`."""
    n = plan.scores_shape[1]
    i, j, m = (jnp.uint32(index) for index in tile)
    count = lambda size: jnp.arange(size, dtype=jnp.uint32)
    example = count(plan.tiles.examples) * jnp.uint32(plan.counts[0]) + i
    head = example.reshape(-1, 1) * jnp.uint32(n) + count(n).reshape(1, n)
    query = count(plan.tiles.queries) + j * jnp.uint32(plan.tiles.queries)
    key = count(plan.tiles.keys) + m * jnp.uint32(plan.tiles.keys)
    return dropout_factor(
        seed,
        plan.dropout_rate,
        head.reshape(-1, plan.key_heads, n // plan.key_heads, 1, 1),
        query.reshape(1, 1, 1, -1, 1),
        key.reshape(1, 1, 1, 1, -1),
    )


def _einsum(equation, left, right):
    """Contract in the narrower dtype of the two and accumulate in the wide one."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(equation, left.astype(right.dtype), right, preferred_element_type=wide)


def _loop(count, step, carry):
    """Scan `step(carry, index)`, without a loop around a single tile."""
    if count == 1:
        carry, result = step(carry, 0)
        return carry, jax.tree.map(lambda array: array[None], result)
    return jax.lax.scan(step, carry, jnp.arange(count))


def _at(array, index, axis):
    return jax.lax.dynamic_index_in_dim(array, index, axis, keepdims=False)


def _add_at(total, step, index):
    return jax.lax.dynamic_update_index_in_dim(total, _at(total, index, 1) + step, index, 1)


def _score_starts(shape, tile):
    """Return the start of a tile in `[bt,i,k,g,j,tq,m,ts]`, whose broadcast axes have size 1."""
    index = dict(zip((1, 4, 6), tile, strict=True))
    return [index[axis] if axis in index and shape[axis] > 1 else 0 for axis in range(8)]


def _take_scores(array, tile):
    bt, _, k, g, _, tq, _, ts = array.shape
    starts = _score_starts(array.shape, tile)
    part = jax.lax.dynamic_slice(array, starts, (bt, 1, k, g, 1, tq, 1, ts))
    return part.reshape(bt, k, g, tq, ts)


def _add_scores(total, step_bkgts, tile):
    bt, _, k, g, _, tq, _, ts = total.shape
    whole = step_bkgts.shape
    reduced = tuple(axis for axis, size in enumerate((bt, k, g, tq, ts)) if size < whole[axis])
    step = step_bkgts.sum(axis=reduced).reshape(bt, 1, k, g, 1, tq, 1, ts)
    starts = _score_starts(total.shape, tile)
    part = jax.lax.dynamic_slice(total, starts, step.shape)
    return jax.lax.dynamic_update_slice(total, part + step, starts)


def _pad(array, axis, size):
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths) if widths[axis][1] else array
