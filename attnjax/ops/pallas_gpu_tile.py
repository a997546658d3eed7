# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels share: their plan, what they read, and the scores of one tile.

A kernel works on tiles `[queries, keys]`, or `[keys, queries]` when it owns a tile of keys. Most
code here need not know which: what belongs to queries or keys arrives as a column or a row.

Scores live in base 2, so that exponentials are single instructions: the raw products x are kept
where nothing but the scale separates them from the scores, and `factor` holds scale * log2(e).

Everything about boundaries is data: which tiles to visit, intervals, segments. Other boundaries of
equal shapes run the same compiled kernel.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from attnjax.ops.dropout import dropout_factor
from attnjax.ops.mask import FULL, PARTIAL, Visibility, schedule
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.partition import over_batch_and_heads
from attnjax.typing import Array

LOG2E = math.log2(math.e)
LEAST = 16
"""Smallest side of an operand of a matrix product."""

AXES = {
    "query": "btnh",
    "key": "bskh",
    "value": "bskv",
    "out": "btnv",
    "dout": "btnv",
    "top": "bnt",
    "rest": "bnt",
    "delta": "bnt",
    "bias": "bnTS",
    "lower": "bnrt",
    "upper": "bnrt",
    "query_ids": "bt",
    "key_ids": "bs",
    "dense": "bnts",
    "full": "bnij",
    "full_count": "bni",
    "partial": "bnij",
    "partial_count": "bni",
    "kinds": "bnij",
    "seed": "w",
    "heads": "bn",
    "indicators": "bzs",
    "entropy": "bnt",
    "max_probability": "bnt",
    "masses": "bnzt",
    "key_mass": "bns",
    "dquery": "btnh",
    "dkey": "bskh",
    "dvalue": "bskv",
    "dbias_keys": "bns",
    "dbias": "bnts",
}
"""Axes of everything that kernels read or write. Upper-case axes may have size 1 and then serve
every position; so may b and n, except in the main arrays. i is the tile that a kernel owns and j
the list of those to visit."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How work is cut.

    Attributes:
      forward, backward: `(queries, keys)` of a tile of scores, powers of two, at least 16.
      forward_warps, backward_warps: per program.
      stages: tiles of the inner loop that are in flight.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    forward_warps: int
    backward_warps: int
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """The compiled-in part of a call.

    Attributes:
      t, s: number of queries and keys.
      width, value_width: h and hv.
      group: query heads per key/value head.
      scale, softcap, dropout_rate: as in `Call`.
      tiles: how work is cut.
      entropy, max_probability: whether the forward kernel adds these statistics.
      is_exact: whether exponents are right to the last bit of float32 for large scores too.
      interpret: emulate, for tests.
      is_partial: whether output and gradients are float32, to be merged with those of other parts.
    """

    t: int
    s: int
    width: int
    value_width: int
    group: int
    scale: float
    softcap: float | None
    dropout_rate: float
    tiles: Tiles
    entropy: bool
    max_probability: bool
    is_exact: bool
    interpret: bool
    is_partial: bool = False

    def counts(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Return the number of tiles along queries and keys."""
        return pl.cdiv(self.t, tile[0]), pl.cdiv(self.s, tile[1])


def result_dtype(plan: Plan, array: Any) -> Any:
    """Return the dtype of the output, or of the gradient of an array."""
    return jnp.float32 if plan.is_partial else array.dtype


def factor(plan: Plan, inputs: Any) -> float:
    """Return what turns the scores of kernels into scores of base 2.

    Where scores are the raw products times a positive number, it is that number.

    Args:
      plan: of the call.
      inputs: a container of the names of what there is.
    """
    is_raw = plan.softcap is None and "bias" not in inputs and plan.scale > 0
    return plan.scale * LOG2E if is_raw else 1.0


def padded(width: int) -> int:
    """Return the width of the tile that holds heads of this width."""
    return max(LEAST, pl.next_power_of_2(width))


def tables(visibility: Visibility, plan: Plan) -> dict[str, Any]:
    """Turn a visibility into the arrays that kernels read.

    Returns:
      `visible`: the arrays that say what is visible inside a tile, by their names in `AXES`.
      `forward`, `query_major`, `key_major`: the tiles to visit, for forward tiles of queries and
      for backward tiles of queries and of keys. `kinds`: the block map of the backward tile. All
      are empty when everything is visible.
    """
    found: dict[str, Any] = {
        "visible": {}, "forward": {}, "query_major": {}, "key_major": {}, "kinds": {},
    }  # fmt: skip
    if visibility.is_full:
        return found
    for name in ("lower", "upper", "query_ids", "key_ids"):
        if (array := getattr(visibility, name)) is not None:
            found["visible"][name] = array.astype(np.int32)
    forward, kinds = (
        _kinds(visibility, plan, tile) for tile in (plan.tiles.forward, plan.tiles.backward)
    )
    if visibility.rest is not None and any(_may_be_partial(x) for x in (forward, kinds)):
        dense = lambda: visibility.rest.tile(0, 0, plan.t, plan.s).astype(jnp.int8)
        if (size := jax.eval_shape(dense).size) >= 2**31:
            # Kernels count elements below 4 GiB in signed 32 bits.
            raise NotImplementedError(
                f"pallas_gpu: a mask of {size} elements that is not made of intervals or segments "
                "is not served"
            )
        found["visible"]["dense"] = dense()
    found["forward"] = _lists(forward)
    found["query_major"] = _lists(kinds)
    found["key_major"] = _lists(kinds.swapaxes(2, 3))
    found["kinds"] = {"kinds": kinds}
    return found


def _may_be_partial(kinds):
    """Whether a tile may need its elements looked at; blocks as large as tiles never do."""
    return not isinstance(kinds, np.ndarray) or bool((kinds == PARTIAL).any())


def _kinds(visibility, plan, tile):
    """Return the block map, in which a tile that reaches beyond the keys is never FULL."""
    kinds = visibility.block_map(plan.t, plan.s, *tile)
    if plan.s % tile[1]:
        is_last = np.arange(kinds.shape[3]) == kinds.shape[3] - 1
        xp = np if isinstance(kinds, np.ndarray) else jnp
        kinds = xp.where(is_last & (kinds == FULL), np.int8(PARTIAL), kinds)
    return kinds


def _lists(kinds):
    plan = schedule(kinds)
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(launcher: Callable, plan: Plan, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run a kernel on every device's share of examples and heads; differentiating it is refused.

    Args:
      launcher: `launcher(plan, inputs)` launches it.
      plan: of the call.
      inputs: arrays by their names in `AXES`.

    Returns:
      The results by name.
    """
    return over_batch_and_heads(functools.partial(launcher, plan), inputs, AXES)


def _refuse(*_):
    raise NotImplementedError(
        "pallas_gpu: second derivatives are not served; use implementation='chunked' or 'reference'"
    )


run.defvjp(_refuse, _refuse)


def launch(
    kernel: Callable,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    grid: int,
    where: Callable[[Array], dict[str, Array]],
    sizes: dict[str, int],
    plan: Plan,
    warps: int,
    name: str,
) -> dict[str, Array]:
    """Run a kernel on a grid with one axis (the others have narrow limits).

    Args:
      kernel: `kernel(inputs, outputs)` of references to blocks; no axis of a block is dropped.
      inputs: arrays by their names in `AXES`.
      outputs: shapes of the results by their names in `AXES`.
      grid: number of programs.
      where: maps a program to the block that it has of an axis; 0 for axes that are not named.
      sizes: size of the block of an axis; everything for axes that are not named.
      plan: of the call.
      warps: per program.
      name: of the kernel, for profiles.

    Returns:
      The results by name.
    """

    def block(name, array):
        axes = AXES[name]
        is_one = [
            array.shape[i] == 1 and (axis in "bn" or axis.isupper()) for i, axis in enumerate(axes)
        ]
        shape = [
            1 if one else sizes.get(axis.lower(), size)
            for axis, one, size in zip(axes, is_one, array.shape, strict=True)
        ]

        def index(program):
            at = where(program)
            return tuple(
                0 if one else at.get(axis.lower(), 0)
                for axis, one in zip(axes, is_one, strict=True)
            )

        return pl.BlockSpec(tuple(shape), index)

    varying = frozenset().union(*(_varying(array) for array in inputs.values()))
    call = pl.pallas_call(
        kernel,
        grid=(grid,),
        in_specs=({name: block(name, array) for name, array in inputs.items()},),
        out_specs={name: block(name, shape) for name, shape in outputs.items()},
        out_shape={name: _vary(shape, varying) for name, shape in outputs.items()},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=plan.tiles.stages),
        interpret=plan.interpret,
        name=name,
    )
    return call(inputs)


def _varying(array):
    """Return the manual mesh axes over which an array differs, inside shard_map."""
    return jax.typeof(array).manual_axis_type.varying


def _vary(shape, axes):
    if not axes:
        return shape
    kind = jax.sharding.ManualAxisType(varying=axes)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=kind)


def split(index: Array, count: int) -> tuple[Array, Array]:
    """Return quotient and remainder of an index that is not negative."""
    count = np.int32(count)
    return jax.lax.div(index, count), jax.lax.rem(index, count)


def visit(step: Callable, carry: Any, inputs: dict, heads: tuple, count: int, ragged: bool) -> Any:
    """Fold `step(tile, carry, is_partial)` over the tiles to visit, FULL ones first.

    Args:
      step: the body; two copies of it are compiled, one without masks.
      carry: its state.
      inputs: references; without lists in them all tiles are visited.
      heads: (example, head) in the blocks.
      count: number of all tiles.
      ragged: whether the last of all tiles is PARTIAL when nothing else is masked.

    Returns:
      The last state.
    """
    if "full" not in inputs:
        full = np.int32(count - ragged)
        carry = jax.lax.fori_loop(np.int32(0), full, lambda j, c: step(j, c, False), carry)
        return step(full, carry, True) if ragged else carry
    for name, is_partial in (("full", False), ("partial", True)):
        at = pick(inputs[name], *heads)
        tiles = inputs[name]
        carry = jax.lax.fori_loop(
            np.int32(0),
            inputs[f"{name}_count"][*at, 0],
            lambda j, c: step(tiles[*at, 0, j], c, is_partial),
            carry,
        )
    return carry


def pick(ref: Any, *indices: Any) -> tuple:
    """Return the leading indices of a reference, 0 where an axis has size 1."""
    return tuple(0 if size == 1 else index for size, index in zip(ref.shape, indices, strict=False))


def load_rows(ref: Any, index: tuple, is_real: Array | None, width: int) -> Array:
    """Load rows of heads, zero beyond the width and where `is_real [rows]` is False."""
    columns = ref.shape[-1]
    mask = None if width == columns else (jnp.arange(columns, dtype=jnp.int32) < width)[None, :]
    if is_real is not None:
        mask = is_real[:, None] if mask is None else is_real[:, None] & mask
    return _load(ref, (*index, slice(None)), mask, 0)


def store_rows(ref: Any, index: tuple, rows: Array, is_real: Array | None, width: int) -> None:
    """Store rows of heads up to the width, where `is_real [rows]` is True."""
    columns = ref.shape[-1]
    mask = None if width == columns else (jnp.arange(columns, dtype=jnp.int32) < width)[None, :]
    if is_real is not None:
        mask = is_real[:, None] if mask is None else is_real[:, None] & mask
    if mask is not None:
        mask = jnp.broadcast_to(mask, rows.shape)
    plt.store(ref.at[*_fixed(index), slice(None)], rows.astype(ref.dtype), mask=mask)


def load_vector(ref: Any, index: tuple, is_real: Array | None, other: float = 0) -> Array:
    """Load one number per position, `other` where `is_real` is False."""
    return _load(ref, index, is_real, other)


def store_vector(ref: Any, index: tuple, vector: Array, is_real: Array | None) -> None:
    """Store one number per position where `is_real` is True."""
    plt.store(ref.at[*_fixed(index)], vector.astype(ref.dtype), mask=is_real)


def store_tile(ref: Any, heads: tuple, tile: Array, is_real: tuple) -> None:
    """Store the tile `[queries, keys]` of a head where both (queries, keys) `is_real`."""
    mask = _both(*is_real)
    mask = mask if mask is None else jnp.broadcast_to(mask, tile.shape)
    plt.store(ref.at[*_fixed(heads), slice(None), slice(None)], tile.astype(ref.dtype), mask=mask)


def _load(ref, index, mask, other):
    if mask is None:
        return ref[*index]
    return plt.load(ref.at[*_fixed(index)], mask=mask, other=other)


def _fixed(index):
    # Masked loads and stores are not emulated with Python integers among the indices.
    return tuple(np.int32(i) if isinstance(i, int) else i for i in index)


def product(left: Array, right: Array, left_axis: int = 1, right_axis: int = 1) -> Array:
    """Contract one axis of two matrices of equal dtype into float32."""
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of scores, inside a kernel.

    Attributes:
      plan: of the call.
      inputs: references to blocks, by name.
      size: `(queries, keys)`.
      starts: `(query, key)` at which it starts.
      offsets: the same, counted in the blocks of the references.
      heads: (example, query head) in the blocks.
      is_partial: whether something in it may be invisible.
      key_major: whether matrices are `[keys, queries]`.
    """

    plan: Plan
    inputs: dict
    size: tuple[int, int]
    starts: tuple[Any, Any]
    offsets: tuple[Any, Any]
    heads: tuple[Any, Any]
    is_partial: bool
    key_major: bool = False

    @property
    def queries(self) -> Any:
        """Where the queries are in their blocks."""
        return pl.ds(self.offsets[0], self.size[0])

    @property
    def keys(self) -> Any:
        """Where the keys are in their blocks."""
        return pl.ds(self.offsets[1], self.size[1])

    @property
    def real_queries(self) -> Array | None:
        """Which queries exist, or None if all do."""
        return positions(self.starts[0], self.size[0], self.plan.t)

    @property
    def real_keys(self) -> Array | None:
        """Which keys exist, or None if all do: a FULL tile never reaches beyond them."""
        if not (self.is_partial or self.key_major):
            return None
        return positions(self.starts[1], self.size[1], self.plan.s)

    def by_query(self, vector: Array) -> Array:
        """Let one number per query broadcast over the tile."""
        return vector[None, :] if self.key_major else vector[:, None]

    def by_key(self, vector: Array) -> Array:
        """Let one number per key broadcast over the tile."""
        return vector[:, None] if self.key_major else vector[None, :]

    @property
    def factor(self) -> float:
        """What turns the results of `scores` into scores of base 2."""
        return factor(self.plan, self.inputs)

    def scores(self, query: Array, key: Array) -> tuple[Array, Array | None]:
        """Return the scores over `factor`, -inf where invisible, and the slope of the cap.

        Args:
          query: `[queries, width]`.
          key: `[keys, width]`.
        """
        plan = self.plan
        x = product(key, query) if self.key_major else product(query, key)
        slope = None
        if plan.softcap is not None:
            bend = jnp.tanh(x * (plan.scale / plan.softcap))
            x, slope = bend * (plan.softcap * LOG2E), 1 - bend * bend
        elif self.factor == 1:
            x = x * (plan.scale * LOG2E)
        if "bias" in self.inputs:
            x = x + self._bias() * LOG2E
        if self.is_partial and (visible := self._visible()) is not None:
            x = jnp.where(visible, x, -jnp.inf)
        return x, slope

    def exponent(self, x: Array, top: Array, rest: Array | None = None) -> Array:
        """Return `factor * (x - top) - rest`, the logarithm of base 2 of weights.

        Args:
          x: from `scores`.
          top: `[queries]` maximum of every row, over `factor` like x.
          rest: `[queries]` logarithm of base 2 of the sum of every row, or None.
        """
        if self.plan.is_exact:
            shifted = (x - self.by_query(top)) * self.factor
            return shifted if rest is None else shifted - self.by_query(rest)
        # One instruction less per element; the product's rounding shows for scores above 1e3.
        shift = top * self.factor if rest is None else top * self.factor + rest
        return x * self.factor - self.by_query(shift)

    def normalised(self) -> tuple[Array, Array]:
        """Load the `top` and `rest` of every query that make `exponent` that of probabilities."""
        index = (*self.heads, self.queries)
        # A maximum of 1e30 gives the weight zero to queries that do not exist.
        top = load_vector(self.inputs["top"], index, self.real_queries, -EMPTY_LSE)
        return top, load_vector(self.inputs["rest"], index, self.real_queries)

    def dropout(self) -> Array:
        """Return the dropout factors."""
        query, key = (
            (start + jnp.arange(size, dtype=jnp.int32)).astype(jnp.uint32)
            for start, size in zip(self.starts, self.size, strict=True)
        )
        seed = [self.inputs["seed"][i] for i in range(3)]
        heads = self.inputs["heads"]
        head = heads[*pick(heads, *self.heads)]
        rate = self.plan.dropout_rate
        return dropout_factor(seed, rate, head, self.by_query(query), self.by_key(key))

    def _bias(self):
        ref = self.inputs["bias"]
        index = pick(ref, *self.heads)
        has_query, has_key = (size > 1 for size in ref.shape[2:])
        is_real = (self.real_queries, self.real_keys)
        if has_query and has_key:
            mask = _both(*is_real)
            tile = _load(ref, (*index, self.queries, self.keys), mask, 0).astype(jnp.float32)
            return tile.T if self.key_major else tile
        if has_query:
            vector = _load(ref, (*index, self.queries, 0), is_real[0], 0)
            return self.by_query(vector.astype(jnp.float32))
        if has_key:
            vector = _load(ref, (*index, 0, self.keys), is_real[1], 0)
            return self.by_key(vector.astype(jnp.float32))
        return ref[*index, 0, 0].astype(jnp.float32)

    def _visible(self):
        inputs, is_query, is_key = self.inputs, self.real_queries, self.real_keys
        parts = []
        if "lower" in inputs:
            key = self.by_key(self.starts[1] + jnp.arange(self.size[1], dtype=jnp.int32))
            intervals = []
            for r in range(inputs["lower"].shape[2]):
                low, up = (
                    self.by_query(
                        _load(
                            inputs[name],
                            (*pick(inputs[name], *self.heads), r, self.queries),
                            is_query,
                            0,
                        )
                    )
                    for name in ("lower", "upper")
                )
                intervals.append((key >= low) & (key < up))
            parts.append(functools.reduce(operator.or_, intervals))
        elif is_key is not None:
            parts.append(self.by_key(is_key))
        if "query_ids" in inputs:
            query_ids, key_ids = inputs["query_ids"], inputs["key_ids"]
            example = self.heads[0]
            query = _load(query_ids, (*pick(query_ids, example)[:1], self.queries), is_query, 0)
            key = _load(key_ids, (*pick(key_ids, example)[:1], self.keys), is_key, 0)
            parts.append(self.by_query(query) == self.by_key(key))
        if "dense" in inputs:
            ref = inputs["dense"]
            index = (*pick(ref, *self.heads), self.queries, self.keys)
            tile = _load(ref, index, _both(is_query, is_key), 0)
            parts.append((tile.T if self.key_major else tile) != 0)
        return functools.reduce(operator.and_, parts) if parts else None


def positions(start: Any, size: int, end: int) -> Array | None:
    """Return which of the positions from `start` lie before `end`, or None if tiles fit exactly."""
    return start + jnp.arange(size, dtype=jnp.int32) < end if end % size else None


def _both(query, key):
    """Return which elements `[queries, keys]` exist, or None if all do."""
    if query is None or key is None:
        return key[None, :] if query is None and key is not None else _column(query)
    return query[:, None] & key[None, :]


def _column(vector):
    return None if vector is None else vector[:, None]
