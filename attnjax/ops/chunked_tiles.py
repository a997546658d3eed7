# SPDX-License-Identifier: Apache-2.0
"""How `chunked` cuts a call into tiles, which of them it visits, and the scores of one tile.

A tile spans some examples, some key/value heads with all their query heads, some queries and some
keys. Examples and heads are cut with a stride (tile i holds examples i, i + count, ...), so that an
axis that is sharded over devices stays whole on every device while a loop runs over the tiles.

Axes of tiles besides the legend: u groups of examples and heads, j tiles of queries, m tiles of
keys.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.bias import Bias
from attnjax.ops.dropout import dropout_factor
from attnjax.ops.mask import EMPTY, FULL, PARTIAL, schedule
from attnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How much a tile of scores spans.

    Attributes:
      examples: divides the batch.
      queries, keys: of one head.
      heads: key/value heads, divides their number; None for all of them.
    """

    examples: int
    queries: int
    keys: int
    heads: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledMask:
    """A mask cut into tiles: what to visit, and how to evaluate what is visited in part.

    Attributes:
      visibility: padded to whole tiles; if nothing in it is left to evaluate tile by tile, its
        arrays are cut into groups: intervals `[i|1, c|1, bt|1, kt*g|1, r, t]`, ids
        `[i|1, 1, bt|1, t]`.
      full, full_count: `[u|1, j, m]` and `[u|1, j]` int32, see `Schedule`.
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

    Attributes:
      tiles: tile sizes.
      scores_shape: `(b, n, t, s)`.
      key_heads: k.
      scale, softcap, dropout_rate: as in `Call`.
      rule: the structure of the `Elementwise` normalizer, without its arrays; empty for softmax.
      collects: names of what `chunked_statistics` collects.
      is_partial: as in `Call`: output and gradients keep the dtype of the accumulators.
      varying: axes of an enclosing `shard_map` over which all arrays vary.
      skips: visit only scheduled tiles, in loops of dynamic length, which JAX cannot differentiate
        in reverse; otherwise visit all of them, with the mask.
    """

    tiles: Tiles
    scores_shape: tuple[int, int, int, int]
    key_heads: int
    scale: float
    softcap: float | None
    dropout_rate: float
    rule: tuple[Any, ...] = ()
    collects: tuple[str, ...] = ()
    is_partial: bool = False
    varying: tuple[str, ...] = ()
    skips: bool = True

    @property
    def heads(self) -> int:
        """Key/value heads in a tile."""
        return self.tiles.heads or self.key_heads

    @property
    def cuts(self) -> tuple[int, int]:
        """Number of tiles along examples and along key/value heads; u is their product."""
        return self.scores_shape[0] // self.tiles.examples, self.key_heads // self.heads

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of groups of examples and heads, of tiles along queries, and along keys."""
        _, _, t, s = self.scores_shape
        tiles = self.tiles
        return math.prod(self.cuts), math.ceil(t / tiles.queries), math.ceil(s / tiles.keys)

    @property
    def members(self) -> int:
        """Query heads per key/value head."""
        return self.scores_shape[1] // self.key_heads

    @property
    def normalizer(self) -> Any:
        """The `Elementwise` normalizer with None for its arrays, or None for softmax."""
        if not self.rule:
            return None
        return jax.tree.unflatten(self.rule[0], [None] * self.rule[0].num_leaves)

    @property
    def shift(self) -> str:
        """Which shift the scores get before they become weights, see `Elementwise.shift`."""
        return "max" if not self.rule else self.normalizer.shift

    @property
    def has_denominator(self) -> bool:
        """Whether the normalizer sums terms."""
        if not self.rule:
            return True
        one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        return jax.eval_shape(self.normalizer.term, one, one, one) is not None

    def full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Array:
        """Return a constant that may start a loop whose steps depend on the arguments."""
        array = jnp.full(shape, value, dtype)
        return jax.lax.pcast(array, self.varying, to="varying") if self.varying else array

    def weigh(self, scores, top, log_total, row) -> tuple[Array, Array | None]:
        """Return the normalizer's weights of scores and its terms, or None for no terms.

        Args:
          scores: `[..., tq, ts]`.
          top: `[..., tq, 1]` maximum of the row, if the normalizer is softmax or has a shift.
          log_total: `[..., tq, 1]` log-sum-exp relative to it, for the shift "lse".
          row: `[..., tq, 1]` row parameter, or None.
        """
        if not self.rule:
            weights = jnp.exp(scores - top)
            return weights, weights
        normalizer, shift = self.normalizer, None
        if self.shift == "max":
            shift = top
        elif self.shift == "lse":
            scores, shift = scores - top, log_total
        return normalizer.weight(scores, shift, row), normalizer.term(scores, shift, row)

    def denominator(self, total, top, log_total) -> Array:
        """Return what the weighted sum of values is divided by; arguments as in `weigh`."""
        if not self.rule:
            return jnp.where(total == 0, 1, total)
        shift = {"none": None, "max": top, "lse": log_total}[self.shift]
        return self.normalizer.denominator(total, shift)

    def prepare_mask(self, visibility) -> TiledMask | None:
        """Cut a `Visibility` into tiles; None when everything is visible and nothing is padded."""
        _, _, t, s = self.scores_shape
        _, j, m = self.counts
        to_t, to_s = j * self.tiles.queries, m * self.tiles.keys
        if visibility.is_full and to_s == s:
            return None
        kinds = visibility.block_map(t, s, self.tiles.queries, self.tiles.keys)
        xp = np if isinstance(kinds, np.ndarray) else jnp
        if to_s != s:
            # The last tile of keys has columns that are not there.
            last = xp.minimum(kinds[..., -1:], PARTIAL)
            kinds = xp.concatenate([kinds[..., :-1], last], axis=-1)
        # One list serves all heads and examples of a tile, so a tile counts if anybody sees it.
        kinds = self._cut(kinds)
        is_full = (kinds == FULL).all(axis=(2, 3))
        is_empty = (kinds == EMPTY).all(axis=(2, 3))
        kinds = xp.where(is_full, FULL, xp.where(is_empty, EMPTY, PARTIAL)).astype(np.int8)
        if kinds.shape[:2] != (1, 1):
            kinds = xp.broadcast_to(kinds, (*self.cuts, *kinds.shape[2:]))
        lists = schedule(kinds.reshape(-1, *kinds.shape[2:]))
        padded = visibility.pad(t, s, to_t, to_s)
        if padded.rest is None:
            cut = lambda x: self._cut(x) if x.ndim == 4 else self._cut(x[:, None])[:, :, :, 0]
            padded = jax.tree.map(cut, padded)
        # Arrays of a static mask become arguments, so that they are not compiled in.
        return jax.tree.map(
            jnp.asarray,
            TiledMask(padded, lists.full, lists.full_count, lists.partial, lists.partial_count),
        )

    def _cut(self, array_bn: Any) -> Any:
        """Turn `[b|1, n|1, ...]` into `[i|1, c|1, bt|1, kt*g|1, ...]`."""
        (i, c), (b, n) = self.cuts, array_bn.shape[:2]
        examples = (self.tiles.examples, i) if b > 1 else (1, 1)
        heads = (self.heads, c, self.members) if n > 1 else (1, 1, 1)
        array = array_bn.reshape(*examples, *heads, *array_bn.shape[2:])
        rest = range(5, array.ndim)
        array = array.transpose(1, 3, 0, 2, 4, *rest)
        return array.reshape(*array.shape[:3], heads[0] * heads[2], *array.shape[5:])

    def pick(self, array: Array, u: Any) -> Array:
        """Take a group out of what `_cut` made: `[bt|1, kt*g|1, ...]`."""
        at = (u // self.cuts[1], u % self.cuts[1])
        for index in at:
            size = array.shape[0]
            array = jax.lax.dynamic_index_in_dim(array, index if size > 1 else 0, 0, keepdims=False)
        return array

    def split_query(self, array_btnh: Array) -> Array:
        """Cut `[b,t,n,h]` into `[u,j,bt,kt,g,tq,h]`."""
        h = array_btnh.shape[-1]
        (i, c), j = self.cuts, self.counts[1]
        array = pad(array_btnh, 1, j * self.tiles.queries)
        shape = (-1, i, j, self.tiles.queries, self.heads, c, self.members, h)
        array = jnp.einsum("bijtkcgh->icjbkgth", array.reshape(shape))
        return array.reshape(i * c, *array.shape[2:])

    def split_key(self, array_bskh: Array) -> Array:
        """Cut `[b,s,k,h]` into `[u,bt,kt,m*ts,h]`."""
        h = array_bskh.shape[-1]
        (i, c), m = self.cuts, self.counts[2]
        array = pad(array_bskh, 1, m * self.tiles.keys)
        array = array.reshape(-1, i, array.shape[1], self.heads, c, h)
        array = jnp.einsum("biskch->icbksh", array)
        return array.reshape(i * c, *array.shape[2:])

    def split_scores(self, array_bnts: Array) -> Array:
        """Cut a bias into `[bt,i,kt,c,g,j,tq,m,ts]`; broadcast axes stay of size 1."""
        b, n, t, s = array_bnts.shape
        (i, c), (_, j, m) = self.cuts, self.counts
        shape = (self.tiles.examples, i) if b > 1 else (1, 1)
        shape += (self.heads, c, self.members) if n > 1 else (1, 1, 1)
        shape += (j, self.tiles.queries) if t > 1 else (1, 1)
        shape += (m, self.tiles.keys) if s > 1 else (1, 1)
        array = pad(array_bnts, 2, shape[5] * shape[6])
        return pad(array, 3, shape[7] * shape[8]).reshape(shape)

    def join_query(self, array_ujbkgth: Array) -> Array:
        """Undo `split_query`."""
        b, n, t, _ = self.scores_shape
        array = array_ujbkgth.reshape(*self.cuts, *array_ujbkgth.shape[1:])
        array = jnp.einsum("icjbkgth->bijtkcgh", array)
        return array.reshape(b, -1, n, array.shape[-1])[:, :t]

    def join_key(self, array_ubksh: Array) -> Array:
        """Undo `split_key`."""
        b, _, _, s = self.scores_shape
        array = array_ubksh.reshape(*self.cuts, *array_ubksh.shape[1:])
        array = jnp.einsum("icbksh->biskch", array)
        return array.reshape(b, -1, self.key_heads, array.shape[-1])[:, :s]

    def join_mass(self, array_ubkgs: Array) -> Array:
        """Turn what every key of `[u,bt,kt,g,m*ts]` has into `[b,n,s]`."""
        b, n, _, s = self.scores_shape
        array = array_ubkgs.reshape(*self.cuts, *array_ubkgs.shape[1:])
        return jnp.einsum("icbkgs->bikcgs", array).reshape(b, n, -1)[..., :s]

    def join_scores(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Undo `split_scores` for an array whose own shape was `shape`."""
        padded = array.reshape(*shape[:2], math.prod(array.shape[5:7]), math.prod(array.shape[7:]))
        return padded[:, :, : shape[2], : shape[3]]

    def visit(self, mask: TiledMask | None, u: Any, j: Any, step, state):
        """Fold `step(state, m, is_partial)` over the tiles of keys that a tile of queries sees."""
        m = self.counts[2]
        if mask is None or not self.skips or m == 1:
            is_partial = mask is not None
            if m == 1:
                return step(state, 0, is_partial)
            one = lambda carry, index: (step(carry, index, is_partial), None)
            return jax.lax.scan(one, state, jnp.arange(m))[0]
        u = u if mask.full.shape[0] > 1 else 0
        for order, count, is_partial in (
            (mask.full, mask.full_count, False),
            (mask.partial, mask.partial_count, True),
        ):
            tiles = order[u, j]

            def visit_one(at, carry, tiles=tiles, is_partial=is_partial):
                return step(carry, tiles[at], is_partial)

            state = jax.lax.fori_loop(0, count[u, j], visit_one, state)
        return state

    def scores(self, query_bkgth, key_bksh, bias, mask, tile):
        """Return the scores of a tile `[bt,kt,g,tq,ts]` and their derivative by `query . key`.

        Args:
          query_bkgth, key_bksh: the tile's operands.
          bias: from `split_scores`, a `Bias`, or None.
          mask: a `TiledMask` if the tile is visible in part, else None.
          tile: indices (u, j, m) of group, queries, keys.
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
            scores = scores + self.take_scores(bias, tile).astype(wide)
        if mask is not None:
            scores = jnp.where(self.visible(mask, tile), scores, -jnp.inf)
        return scores, slope

    def bias_tile(self, bias: Bias, tile) -> Array:
        """Return one tile of a `Bias`, `[bt|1,kt|1,g|1,tq,ts]`."""
        _, _, t, s = self.scores_shape
        u, j, m = tile
        rows, columns = self.tiles.queries, self.tiles.keys
        value = bias.tile(j * rows, m * columns, rows, columns, t, s)
        return self.split_heads(self.pick(self._cut(value), u))

    def split_heads(self, array_bnts: Array) -> Array:
        """Cut heads of a tile into `[bt|1,kt|1,g|1,tq,ts]`."""
        heads = (self.heads, self.members) if array_bnts.shape[1] > 1 else (1, 1)
        return array_bnts.reshape(array_bnts.shape[0], *heads, *array_bnts.shape[2:])

    def visible(self, mask: TiledMask, tile) -> Array:
        """Evaluate the mask on a tile, bool `[bt|1,kt|1,g|1,tq,ts]`."""
        u, j, m = tile
        visibility = mask.visibility
        rows, columns = self.tiles.queries, self.tiles.keys
        place = (j * rows, m * columns, rows, columns)
        if visibility.rest is None:
            pick = functools.partial(self.pick, u=u)
            visible = jax.tree.map(pick, visibility).tile(*place)
        else:
            visible = self.pick(self._cut(visibility.tile(*place)), u)
        return self.split_heads(visible)

    def dropout(self, seed, tile) -> Array:
        """Return the dropout factors of a tile `[bt,kt,g,tq,ts]`.

        Args:
          seed: words from `dropout_seed`, and the `Place` of the call, or None.
          tile: indices (u, j, m) of group, queries, keys.
        """
        words, place = seed
        u, j, m = (jnp.asarray(index).astype(jnp.uint32) for index in tile)
        count = lambda size: jnp.arange(size, dtype=jnp.uint32)
        examples, cuts = (jnp.uint32(size) for size in self.cuts)
        example = (count(self.tiles.examples) * examples + u // cuts)[:, None, None]
        first = (count(self.heads) * cuts + u % cuts) * jnp.uint32(self.members)
        head = (first[:, None] + count(self.members))[None]
        query = count(self.tiles.queries) + j * jnp.uint32(self.tiles.queries)
        key = count(self.tiles.keys) + m * jnp.uint32(self.tiles.keys)
        if place is None:
            head = example * jnp.uint32(self.scores_shape[1]) + head
        else:
            # Where a tile is padded, any position will do.
            head = place.heads[example, head]
            at = lambda positions, index: jnp.take(positions, index, mode="clip")
            query, key = at(place.queries, query), at(place.keys, key)
        return dropout_factor(
            words,
            self.dropout_rate,
            head[..., None, None],
            query.reshape(1, 1, 1, -1, 1),
            key.reshape(1, 1, 1, 1, -1),
        )

    def take_keys(self, array_bksh: Array, m: Any) -> Array:
        """Return tile m of keys or values `[bt,kt,m*ts,h]`."""
        size = self.tiles.keys
        if array_bksh.shape[2] == size:
            return array_bksh
        return jax.lax.dynamic_slice_in_dim(array_bksh, m * size, size, axis=2)

    def take_scores(self, array: Array, tile) -> Array:
        """Return a tile of what `split_scores` made, `[bt|1,kt|1,g|1,tq|1,ts|1]`."""
        bt, _, k, _, g, _, tq, _, ts = array.shape
        sizes = (bt, 1, k, 1, g, 1, tq, 1, ts)
        part = jax.lax.dynamic_slice(array, self._starts(array.shape, tile), sizes)
        return part.reshape(bt, k, g, tq, ts)

    def add_scores(self, total: Array, step_bkgts: Array, tile) -> Array:
        """Add a tile to what has the form of `split_scores`, summing over broadcast axes."""
        bt, _, k, _, g, _, tq, _, ts = total.shape
        own, whole = (bt, k, g, tq, ts), step_bkgts.shape
        reduced = tuple(axis for axis, size in enumerate(own) if size < whole[axis])
        step = step_bkgts.sum(axis=reduced).reshape(bt, 1, k, 1, g, 1, tq, 1, ts)
        starts = self._starts(total.shape, tile)
        part = jax.lax.dynamic_slice(total, starts, step.shape)
        return jax.lax.dynamic_update_slice(total, part + step, starts)

    def _starts(self, shape, tile) -> list[Any]:
        u, j, m = tile
        index = {1: u // self.cuts[1], 3: u % self.cuts[1], 5: j, 7: m}
        return [index[axis] if axis in index and shape[axis] > 1 else 0 for axis in range(9)]


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


def pad(array: Array, axis: int, size: int) -> Array:
    """Pad an axis with zeros at its end."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths) if widths[axis][1] else array
