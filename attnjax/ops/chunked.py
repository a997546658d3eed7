# SPDX-License-Identifier: Apache-2.0
"""Online-softmax attention in plain XLA: the scores exist one tile at a time.

Forward, over the tiles of keys of one tile of queries, with running maximum m and sum l:

    m' = max(m, max_s scores)      p = exp(scores - m')      l' = exp(m - m') l + sum_s p
    acc' = exp(m - m') acc + p . value                       out = acc / l, lse = m + log l

Only tiles that the mask's schedule lists are visited: FULL ones without any masking, PARTIAL ones
with it. The schedule is data, so other boundaries of the same shapes run the same program. The
backward pass (`chunked_bwd`) recomputes every tile from (out, m, log l); temporary memory is linear
in both lengths. Reverse mode works to any order; from the second on, all tiles are visited and
their steps stored. Forward mode is refused by JAX, as for every function with its own backward
pass: `implementation="reference"` serves it.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.attention import AttentionOutput, Call
from attnjax.ops.bias import Bias
from attnjax.ops.dropout import dropout_factor, dropout_seed
from attnjax.ops.mask import EMPTY, FULL, PARTIAL, schedule
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.typing import Array

# Scores in a tile on CPU. Above the first they fall out of the cache; below the second the loop
# costs more than it saves. Measured on two cores with 32 MiB of L3 cache.
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
      An `AttentionOutput` without probabilities and scores.

    Raises:
      NotImplementedError: the call asks for something that needs whole rows at once.
    """
    call.refuse("chunked", "normalizer", "return_probabilities", "return_scores", "edit")
    b, n, t, s = call.scores_shape
    if b == 0:
        raise NotImplementedError("chunked: an empty batch is not served")
    tiles = tiles or choose_tiles(b, n, t, s)
    if call.visibility.rest is not None:
        # A mask of any kind is evaluated for all examples of a tile at once.
        tiles = dataclasses.replace(tiles, examples=b)
    plan = Plan(
        tiles=tiles,
        scores_shape=(b, n, t, s),
        key_heads=call.key.shape[2],
        scale=call.scale,
        softcap=call.softcap,
        dropout_rate=call.dropout_rate,
    )
    seed = dropout_seed(call.dropout_key) if call.dropout_rate else None
    mask = plan.prepare_mask(call.visibility)
    out, lse = _attend_jit(plan, call.query, call.key, call.value, call.bias, mask, seed)
    statistics = {}
    if call.statistics:
        from attnjax.ops.chunked_statistics import measure

        arrays = jax.lax.stop_gradient((call.query, call.key, lse, call.bias))
        statistics = measure(plan, *arrays, mask, call.extra_logit, call.statistics)
    return AttentionOutput(out=out, lse=lse if call.return_lse else None, statistics=statistics)


def choose_tiles(b: int, n: int, t: int, s: int) -> Tiles:
    """Choose tile sizes for scores of shape `(b, n, t, s)`.

    On CPU a tile of scores should stay in the cache, so few examples share one, or only one per
    device of the ambient mesh. An accelerator wants wide steps: all examples at once.
    """
    keys = s if s <= 1024 else _even(s, 512)
    examples, queries = b, _even(t, 256)
    if jax.default_backend() == "cpu":
        queries = _even(t, max(64, LARGE_TILE // (n * keys)))
        # The ways the batch is cut divide both, whatever the other axes of the mesh are for.
        shards = math.gcd(b, _ambient_devices())
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledMask:
    """A mask cut into tiles: what to visit, and how to evaluate what is visited in part.

    Attributes:
      visibility: padded to whole tiles; intervals `[bt|1, i|1, n|1, r, t]`, ids `[bt|1, i|1, t]`.
      full, full_count: `[i|1, j, m]` and `[i|1, j]` int32, see `Schedule`.
      partial, partial_count: the same for tiles that are visible in part.
    """

    visibility: Any
    full: Any
    full_count: Any
    partial: Any
    partial_count: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """The compiled-in part of a call, and how its arrays are cut into tiles.

    Examples are cut with a stride (tile i holds examples i, i + count, ...), so that a batch axis
    sharded over devices stays whole on every device while a loop runs over the tiles.

    Attributes:
      tiles: tile sizes.
      scores_shape: `(b, n, t, s)`.
      key_heads: k.
      scale, softcap, dropout_rate: as in `Call`.
      skips: visit only scheduled tiles, in loops of dynamic length, which JAX cannot differentiate
        in reverse; otherwise visit all of them, with the mask.
    """

    tiles: Tiles
    scores_shape: tuple[int, int, int, int]
    key_heads: int
    scale: float
    softcap: float | None
    dropout_rate: float
    skips: bool = True

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of tiles along examples, queries and keys."""
        b, _, t, s = self.scores_shape
        tiles = self.tiles
        return b // tiles.examples, math.ceil(t / tiles.queries), math.ceil(s / tiles.keys)

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.scores_shape[1] // self.key_heads

    def prepare_mask(self, visibility) -> TiledMask | None:
        """Cut a `Visibility` into tiles; None when everything is visible and nothing is padded."""
        b, _, t, s = self.scores_shape
        i, j, m = self.counts
        to_t, to_s = j * self.tiles.queries, m * self.tiles.keys
        if visibility.is_full and to_s == s:
            return None
        kinds = visibility.block_map(t, s, self.tiles.queries, self.tiles.keys)
        xp = np if isinstance(kinds, np.ndarray) else jnp
        if to_s != s:
            # The last tile of keys has columns that are not there.
            last = xp.minimum(kinds[..., -1:], PARTIAL)
            kinds = xp.concatenate([kinds[..., :-1], last], axis=-1)
        parts = (-1, i) if kinds.shape[0] == b and b > 1 else (1, 1)
        kinds = kinds.reshape(*parts, *kinds.shape[1:])
        # One list serves all heads and examples of a tile, so a tile counts if anybody sees it.
        is_full = (kinds == FULL).all(axis=(0, 2))
        is_empty = (kinds == EMPTY).all(axis=(0, 2))
        kinds = xp.where(is_full, FULL, xp.where(is_empty, EMPTY, PARTIAL)).astype(np.int8)
        lists = schedule(kinds)
        padded = visibility.pad(t, s, to_t, to_s)
        if padded.rest is None:
            padded = jax.tree.map(lambda x: _split_examples(x, b, i), padded)
        # Arrays of a static mask become arguments, so that they are not compiled in.
        return jax.tree.map(
            jnp.asarray,
            TiledMask(padded, lists.full, lists.full_count, lists.partial, lists.partial_count),
        )

    def split_query(self, array_btnh: Array) -> Array:
        """Cut `[b,t,n,h]` into `[i,j,bt,k,g,tq,h]`."""
        b, _, _, h = array_btnh.shape
        i, j, _ = self.counts
        array = pad(array_btnh, 1, j * self.tiles.queries)
        array = array.reshape(b // i, i, j, self.tiles.queries, self.key_heads, self.groups, h)
        return jnp.einsum("bijtkgh->ijbkgth", array)

    def split_key(self, array_bskh: Array) -> Array:
        """Cut `[b,s,k,h]` into `[i,bt,k,m*ts,h]`."""
        b, _, k, h = array_bskh.shape
        i, _, m = self.counts
        array = pad(array_bskh, 1, m * self.tiles.keys)
        return jnp.einsum("biskh->ibksh", array.reshape(b // i, i, -1, k, h))

    def split_scores(self, array_bnts: Array) -> Array:
        """Cut a bias into `[bt,i,k,g,j,tq,m,ts]`; broadcast axes stay of size 1."""
        b, n, t, s = array_bnts.shape
        i, j, m = self.counts
        shape = (b // i, i) if b > 1 else (1, 1)
        shape += (self.key_heads, self.groups) if n > 1 else (1, 1)
        shape += (j, self.tiles.queries) if t > 1 else (1, 1)
        shape += (m, self.tiles.keys) if s > 1 else (1, 1)
        array = pad(array_bnts, 2, shape[4] * shape[5])
        return pad(array, 3, shape[6] * shape[7]).reshape(shape)

    def join_query(self, array_ijbkgth: Array) -> Array:
        """Undo `split_query`."""
        b, n, t, _ = self.scores_shape
        array = jnp.einsum("ijbkgth->bijtkgh", array_ijbkgth)
        return array.reshape(b, -1, n, array.shape[-1])[:, :t]

    def join_key(self, array_ibksh: Array) -> Array:
        """Undo `split_key`."""
        b, _, _, s = self.scores_shape
        array = jnp.einsum("ibksh->biskh", array_ibksh)
        return array.reshape(b, *array.shape[2:])[:, :s]

    def join_scores(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Undo `split_scores` for an array whose own shape was `shape`."""
        padded = array.reshape(*shape[:2], math.prod(array.shape[4:6]), math.prod(array.shape[6:]))
        return padded[:, :, : shape[2], : shape[3]]

    def visit(self, mask: TiledMask | None, i: Any, j: Any, step, state):
        """Fold `step(state, m, is_partial)` over the tiles of keys that a tile of queries sees."""
        m = self.counts[2]
        if mask is None or not self.skips:
            is_partial = mask is not None
            if m == 1:
                return step(state, 0, is_partial)
            one = lambda carry, index: (step(carry, index, is_partial), None)
            return jax.lax.scan(one, state, jnp.arange(m))[0]
        i = i if mask.full.shape[0] > 1 else 0
        for order, count, is_partial in (
            (mask.full, mask.full_count, False),
            (mask.partial, mask.partial_count, True),
        ):
            tiles = order[i, j]

            def visit_one(at, carry, tiles=tiles, is_partial=is_partial):
                return step(carry, tiles[at], is_partial)

            state = jax.lax.fori_loop(0, count[i, j], visit_one, state)
        return state

    def scores(self, query_bkgth, key_bksh, bias, mask, tile):
        """Return the scores of a tile `[bt,k,g,tq,ts]` and their derivative by `query . key`.

        Args:
          query_bkgth, key_bksh: the tile's operands.
          bias: from `split_scores`, a `Bias`, or None.
          mask: a `TiledMask` if the tile is visible in part, else None.
          tile: indices (i, j, m) of examples, queries, keys.
        """
        wide = jnp.promote_types(query_bkgth.dtype, jnp.float32)
        scores = self.scale * einsum("bkgth,bksh->bkgts", query_bkgth, key_bksh)
        slope: Any = self.scale
        if self.softcap is not None:
            bend = jnp.tanh(scores / self.softcap)
            scores, slope = self.softcap * bend, self.scale * (1 - bend * bend)
        if isinstance(bias, Bias):
            scores = scores + self.bias_tile(bias, tile).astype(wide)
        elif bias is not None:
            scores = scores + take_scores(bias, tile).astype(wide)
        if mask is not None:
            scores = jnp.where(self.visible(mask, tile), scores, -jnp.inf)
        return scores, slope

    def bias_tile(self, bias: Bias, tile) -> Array:
        """Return one tile of a `Bias`, `[bt|1,k|1,g|1,tq,ts]`."""
        _, _, t, s = self.scores_shape
        i, j, m = tile
        rows, columns = self.tiles.queries, self.tiles.keys
        value = bias.tile(j * rows, m * columns, rows, columns, t, s)
        if value.shape[0] > 1:
            value = value.reshape(self.tiles.examples, -1, *value.shape[1:])
            value = jax.lax.dynamic_index_in_dim(value, i, 1, keepdims=False)
        return self.split_heads(value)

    def split_heads(self, array_bnts: Array) -> Array:
        """Cut heads into `[b|1,k|1,g|1,tq,ts]`."""
        heads = (self.key_heads, self.groups) if array_bnts.shape[1] > 1 else (1, 1)
        return array_bnts.reshape(array_bnts.shape[0], *heads, *array_bnts.shape[2:])

    def visible(self, mask: TiledMask, tile) -> Array:
        """Evaluate the mask on a tile, bool `[bt|1,k|1,g|1,tq,ts]`."""
        i, j, m = tile
        visibility = mask.visibility
        if visibility.rest is None:
            visibility = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(
                    x, i if x.shape[1] > 1 else 0, 1, keepdims=False
                ),
                visibility,
            )
        rows, columns = self.tiles.queries, self.tiles.keys
        return self.split_heads(visibility.tile(j * rows, m * columns, rows, columns))

    def dropout(self, seed, tile) -> Array:
        """Return the dropout factors of a tile `[bt,k,g,tq,ts]`."""
        n = self.scores_shape[1]
        i, j, m = (jnp.asarray(index).astype(jnp.uint32) for index in tile)
        count = lambda size: jnp.arange(size, dtype=jnp.uint32)
        example = count(self.tiles.examples) * jnp.uint32(self.counts[0]) + i
        head = example.reshape(-1, 1) * jnp.uint32(n) + count(n).reshape(1, n)
        query = count(self.tiles.queries) + j * jnp.uint32(self.tiles.queries)
        key = count(self.tiles.keys) + m * jnp.uint32(self.tiles.keys)
        return dropout_factor(
            seed,
            self.dropout_rate,
            head.reshape(-1, self.key_heads, self.groups, 1, 1),
            query.reshape(1, 1, 1, -1, 1),
            key.reshape(1, 1, 1, 1, -1),
        )


def with_scanned_gradient(function):
    """Let a function of (plan, *operands) that skips tiles be differentiated once more.

    Its derivative is that of the same function without skipping, loops of fixed length.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    @functools.wraps(function)
    def skipping(plan, *operands):
        return function(plan, *operands)

    def backward_rule(plan, operands, cotangents):
        whole = functools.partial(function, dataclasses.replace(plan, skips=False))
        return jax.vjp(whole, *operands)[1](cotangents)

    skipping.defvjp(lambda plan, *operands: (function(plan, *operands), operands), backward_rule)
    return skipping


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, bias, mask, seed):
    return _forward(plan, query, key, value, bias, mask, seed)[0]


@with_scanned_gradient
def forward(plan, query, key, value, bias, mask, seed):
    """Return `out [b,t,n,hv]`, and m and log l, each `[b,t,n,1]`; see the module's equations."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    i_count, j_count, _ = plan.counts
    query_all, key_all, value_all = (
        plan.split_query(query), plan.split_key(key), plan.split_key(value),
    )  # fmt: skip
    bias_all = bias if bias is None or isinstance(bias, Bias) else plan.split_scores(bias)

    def example_step(_, index_and_rows):
        i, query_b, key_b, value_b = index_and_rows

        def query_step(_, index_and_query):
            j, query_bkgth = index_and_query

            def key_step(state, m, is_partial):
                top, total, sum_bkgth = state
                tile = (i, j, m)
                scores, _ = plan.scores(
                    query_bkgth, take_keys(key_b, m, plan), bias_all,
                    mask if is_partial else None, tile,
                )  # fmt: skip
                # The maximum cancels in the result: no gradient, and finite for empty rows.
                new_top = jax.lax.stop_gradient(
                    jnp.maximum(top, scores.max(axis=-1, keepdims=True))
                )
                shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
                total = shrink * total + weights.sum(axis=-1, keepdims=True)
                if plan.dropout_rate:
                    weights = weights * plan.dropout(seed, tile).astype(wide)
                step = einsum("bkgts,bksh->bkgth", weights, take_keys(value_b, m, plan))
                return new_top, total, shrink * sum_bkgth + step

            rows = query_bkgth.shape[:-1]
            start = (
                jnp.full((*rows, 1), EMPTY_LSE, wide),
                jnp.zeros((*rows, 1), wide),
                jnp.zeros((*rows, value.shape[-1]), wide),
            )
            top, total, sum_bkgth = plan.visit(mask, i, j, key_step, start)
            # A row without keys keeps the initial maximum, EMPTY_LSE.
            total = jnp.where(total == 0, 1, total)
            return None, ((sum_bkgth / total).astype(query.dtype), top, jnp.log(total))

        return None, loop(query_step, None, (jnp.arange(j_count), query_b))[1]

    rows = (jnp.arange(i_count), query_all, key_all, value_all)
    _, results = loop(example_step, None, rows)
    return tuple(plan.join_query(array) for array in results)


def _forward(plan, query, key, value, bias, mask, seed):
    out, top, log_total = forward(plan, query, key, value, bias, mask, seed)
    lse = (top + log_total)[..., 0].swapaxes(1, 2)
    operands, results = (query, key, value, bias, mask, seed), (out, top, log_total)
    return (out, lse), (operands, results)


def _backward(plan, saved, cotangents):
    from attnjax.ops.chunked_bwd import backward

    return (*backward(plan, *saved, cotangents), None, None)


_attend.defvjp(_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=0)


def einsum(equation: str, left: Array, right: Array) -> Array:
    """Contract in the narrower dtype of the two and accumulate in the wide one."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(equation, left.astype(right.dtype), right, preferred_element_type=wide)


def loop(step, carry, inputs):
    """Scan, without a loop around a single step."""
    if jax.tree.leaves(inputs)[0].shape[0] == 1:
        carry, result = step(carry, jax.tree.map(lambda x: x[0], inputs))
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(step, carry, inputs)


def take_keys(array_bksh: Array, m: Any, plan: Plan) -> Array:
    """Return tile m of keys or values `[bt,k,m*ts,h]`."""
    size = plan.tiles.keys
    if array_bksh.shape[2] == size:
        return array_bksh
    return jax.lax.dynamic_slice_in_dim(array_bksh, m * size, size, axis=2)


def take_scores(array: Array, tile) -> Array:
    """Return a tile of what `Plan.split_scores` made, `[bt|1,k|1,g|1,tq|1,ts|1]`."""
    bt, _, k, g, _, tq, _, ts = array.shape
    part = jax.lax.dynamic_slice(
        array, score_starts(array.shape, tile), (bt, 1, k, g, 1, tq, 1, ts)
    )
    return part.reshape(bt, k, g, tq, ts)


def score_starts(shape, tile) -> list[Any]:
    """Return the start of a tile in `[bt,i,k,g,j,tq,m,ts]`, whose broadcast axes have size 1."""
    index = dict(zip((1, 4, 6), tile, strict=True))
    return [index[axis] if axis in index and shape[axis] > 1 else 0 for axis in range(8)]


def pad(array: Array, axis: int, size: int) -> Array:
    """Pad an axis with zeros at its end."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths) if widths[axis][1] else array


def _split_examples(x, b, i):
    parts = (b // i, i) if x.shape[0] == b and b > 1 else (1, 1)
    return x.reshape(*parts, *x.shape[1:])
