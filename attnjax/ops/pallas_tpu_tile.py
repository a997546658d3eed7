# SPDX-License-Identifier: Apache-2.0
"""What the TPU kernels share: tiles, schedules, operands, and the scores of one tile.

Arrays enter the kernels as `[b, t, n * h]` with h padded to whole lanes, so that a head is a
column of blocks and nothing needs to be transposed. Scores are kept in units of log 2: the
hardware's exponential is 2 ** x.

A schedule lists, for every example and head, the tiles that hold anything visible, query tile by
query tile. It is data in scalar memory that steers which blocks are fetched; its length bounds the
grid at run time. So skipped tiles cost nothing, and other boundaries of equal shapes compile
nothing. The tiles of one entry are

    FULL      everything is visible: no masking code runs
    PARTIAL   cut into smaller tiles, of which a bit each says whether anything is visible
    EMPTY     only for tiles of queries that see nothing: their results must be written
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.ops.dropout import dropout_factor
from attnjax.ops.mask import EMPTY, FULL, PARTIAL, Visibility
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.partition import MESH_AXES, over_batch_and_heads
from attnjax.typing import Array

NAME = "pallas_tpu"
LANES = 128
LOG2E = math.log2(math.e)
LN2 = math.log(2)
EMPTY_MAX = EMPTY_LSE * LOG2E
"""Running maximum of a row that has seen nothing: finite, so that differences stay finite."""

NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
"""Dimension numbers: contract last with last, last with first, first with first."""

_MOST_KEYS = 512
"""Keys whose scores are computed at once; more do not fit the registers, fewer wait for results."""
_FIRST, _LAST, _KIND, _PREPARE = 0, 1, 2, 4
_KEY_TILE, _QUERY_TILE = 6, 18
_MOST_KEY_TILES, _MOST_QUERY_TILES = 2**12, 2**13
"""Bits of an entry of a schedule."""

_interpret = contextvars.ContextVar("interpret", default=None)


@contextlib.contextmanager
def interpreted(how: Any = True) -> Iterator[None]:
    """Run the kernels on any backend inside this context, to test them.

    Args:
      how: what `pallas_call(interpret=...)` takes: True emulates with plain XLA, and a
        `pltpu.InterpretParams` imitates a TPU's memories, uninitialised ones included.
    """
    token = _interpret.set(how)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpretation() -> Any:
    """Return what `interpreted` was told, or None outside of it."""
    return _interpret.get()


@dataclasses.dataclass(frozen=True)
class Chip:
    """What kernels must know of the chip.

    Attributes:
      generation: 4 for v4, 5 for v5e and v5p, and so on.
      vmem, smem: bytes of vector and scalar memory.
    """

    generation: int
    vmem: int
    smem: int


def find_chip() -> Chip:
    """Return the chip that the kernels are for.

    It is that of the ambient mesh, as when compiling ahead of time for another machine, or else of
    the default backend.

    Raises:
      NotImplementedError: that is no TPU.
    """
    if interpretation():
        return Chip(5, 128 * 2**20, 2**20)
    if not pltpu.is_tpu_device():
        raise NotImplementedError(
            f"{NAME}: the backend is {jax.default_backend()!r}, not a TPU (tests run it inside "
            "attnjax.ops.pallas_tpu.interpreted())"
        )
    info = pltpu.get_tpu_info()
    return Chip(info.generation, info.vmem_capacity_bytes, info.smem_capacity_bytes)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, all multiples of 128.

    Attributes:
      queries, keys: of a tile of scores.
      resident: keys whose gradients the backward kernel holds in memory, a multiple of `keys`.
        Longer sequences are walked once per stretch of that many keys.
    """

    queries: int
    keys: int
    resident: int

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size < LANES or size % LANES for size in sizes) or self.resident % self.keys:
            raise ValueError(f"{self} must be multiples of {LANES}, and resident one of keys")

    @property
    def sub(self) -> tuple[int, int]:
        """Queries and keys of the smaller tiles that PARTIAL ones are cut into."""
        return _divisor(self.queries), _divisor(self.keys)


def _divisor(size: int) -> int:
    """Return the largest multiple of 128 up to `_MOST_KEYS` that divides a tile."""
    return next(part for part in range(_MOST_KEYS, 0, -LANES) if size % part == 0)


def choose_tiles(
    shape: tuple[int, int, int, int],
    dtype: Any,
    chip: Chip,
    *,
    extra: int = 0,
    found: Mapping[str, int] | None = None,
) -> Tiles:
    """Choose tile sizes.

    Args:
      shape: t, s, h and hv.
      dtype: of query, key and value.
      chip: the chip.
      extra: bytes that every score of a tile takes in further inputs, such as a bias.
      found: queries and keys of a tile that were measured to be best, multiples of 128.
    """
    t, s, h, hv = shape
    width = padded(h) + padded(hv)
    size = jnp.dtype(dtype).itemsize
    budget = chip.vmem // 2

    def need(queries, keys):
        inputs = 4 * (queries + keys) * width * size + 2 * queries * keys * extra
        columns = 8 * queries * LANES * 4
        return inputs + columns + queries * width * 4 + 8 * queries * _divisor(keys)

    limit = 1024
    while limit > LANES and need(limit, limit) > budget:
        limit //= 2
    queries, keys = _even(t, limit), _even(s, limit)
    if found is not None and need(found["queries"], found["keys"]) <= budget:
        queries, keys = min(found["queries"], padded(t)), min(found["keys"], padded(s))
    left = max(chip.vmem * 3 // 4 - need(queries, keys), 0)
    per_key = width * (4 + 2 * size)
    resident = max(left // (per_key * keys), 1)
    return Tiles(queries, keys, keys * min(resident, math.ceil(s / keys)))


def _even(size: int, limit: int) -> int:
    """Return the tile for an axis that wastes least, counting what a tile costs by itself."""
    overhead = 64
    sizes = range(min(limit, padded(size)), 0, -LANES)
    candidates = [tile for tile in sizes if 2 * _divisor(tile) >= tile]
    return min(candidates, key=lambda tile: math.ceil(size / tile) * (tile + overhead))


def padded(size: int, tile: int = LANES) -> int:
    """Round up to whole tiles."""
    return tile * math.ceil(size / tile)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled into the kernels.

    Attributes:
      tiles: sizes of tiles.
      shape: t, s, h and hv.
      scale, softcap, dropout_rate: as in `Call`.
      chip: the chip.
      is_masked: whether any tile may be PARTIAL.
      has_largest, has_entropy, has_key_mass: statistics that are wanted.
      interpret: how to emulate the kernels, or None to compile them.
      is_partial: whether output and gradients are float32, to be merged with those of other parts.
    """

    tiles: Tiles
    shape: tuple[int, int, int, int]
    scale: float
    softcap: float | None
    dropout_rate: float
    chip: Chip
    is_masked: bool
    has_largest: bool
    has_entropy: bool
    has_key_mass: bool
    interpret: Any = None
    is_partial: bool = False

    @property
    def lengths(self) -> tuple[int, int]:
        """Padded numbers of queries and keys."""
        return padded(self.shape[0], self.tiles.queries), padded(self.shape[1], self.tiles.keys)

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of tiles of queries and keys."""
        t, s = self.lengths
        return t // self.tiles.queries, s // self.tiles.keys

    @property
    def widths(self) -> tuple[int, int]:
        """Padded widths of keys and values."""
        return padded(self.shape[2]), padded(self.shape[3])


AXES = {
    "query": "btnh",
    "key": "bskh",
    "value": "bskv",
    "bias": "bnts",
    "codes": "bncx",
    "bits": "bncx",
    "count": "",
    "stretch_codes": "bncx",
    "stretch_bits": "bncx",
    "stretch_count": "",
    "kinds": "bnij",
    "bounds": "bnrt",
    "query_ids": "bnrt",
    "key_ids": "bnrs",
    "rest": "bnxts",
    "rest_at": "x",
    "seed": "x",
    "heads": "bnx",
    "indicators": "bnrs",
    "extra_logit": "bnt",
    "lse": "bnt",
    "shift": "bnt",
    "rows": "bnrt",
    "key_mass": "bns",
    "out": "btnv",
    "dout": "btnv",
    "dquery": "btnh",
    "dkey": "bskh",
    "dvalue": "bskv",
    "dbias": "bnts",
}
"""Inputs and results of the kernels, as `over_batch_and_heads` wants it; see `make_tables`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(
    launcher: Callable[[Plan, Mapping[str, Array]], dict[str, Array]],
    plan: Plan,
    inputs: dict[str, Array],
) -> dict[str, Array]:
    """Run a kernel on what each device holds; under `vmap`, once per element.

    Args:
      launcher: `launcher(plan, inputs)` launches it.
      plan: the plan.
      inputs: arrays by their names in `AXES`.

    Returns:
      The results by name.

    Raises:
      NotImplementedError: it is differentiated.
    """
    # The batching of kernels whose grid depends on data is not defined.
    once = jax.custom_batching.sequential_vmap(functools.partial(launcher, plan))
    return over_batch_and_heads(once, inputs, AXES, mesh_axes=MESH_AXES)


def _refuse(*_):
    raise NotImplementedError(
        f"{NAME}: second derivatives are not served; use implementation='chunked' or 'reference'"
    )


run.defvjp(_refuse, _refuse)


# ---- Schedules ----------------------------------------------------------------------------------


def make_tables(visibility: Visibility, plan: Plan) -> dict[str, Any]:
    """Turn a visibility into what the kernels read.

    Returns:
      Arrays whose first two axes are `[b|1, n|1]`, and scalars. NumPy where the mask is static.

        codes, bits        `[b|1, n|1, 1, steps]` int32: the schedule
        count              int32 scalar: steps to make
        stretch_codes, stretch_bits, stretch_count
                           the same with one schedule for each stretch of resident keys
        kinds              `[b|1, n|1, tiles_q, tiles_k]` int32
        bounds             `[b|1, n|1, 2r, t]` int32, or absent: see `_visible`
        query_ids, key_ids `[b|1, 1, 1, t|s]` int32, or absent
        rest               `[b|1, n|1, tiles, queries, keys]` int8, or absent: whatever is neither
        rest_at            `[tiles_q * tiles_k]` int32: where to find a tile of it

    Raises:
      NotImplementedError: the schedule does not fit scalar memory.
    """
    (t, s, _, _), (to_t, to_s) = plan.shape, plan.lengths
    tiles_q, tiles_k = plan.counts
    if tiles_q > _MOST_QUERY_TILES or tiles_k > _MOST_KEY_TILES:
        raise NotImplementedError(f"{NAME}: {tiles_q} x {tiles_k} tiles are not served")
    whole = visibility.pad(t, s, to_t, to_s)
    sub_q, sub_k = plan.tiles.sub
    kinds = whole.block_map(to_t, to_s, sub_q, sub_k)
    tables = _schedule(kinds, plan, tiles_k)
    stretch = plan.tiles.resident // plan.tiles.keys
    if stretch < tiles_k:
        for name, value in _schedule(kinds, plan, stretch).items():
            if name != "kinds":
                tables[f"stretch_{name}"] = value
    if whole.lower is not None:
        tables["bounds"] = _encode_bounds(whole.lower, whole.upper)
    if whole.query_ids is not None:
        tables["query_ids"] = whole.query_ids[:, None, None]
        tables["key_ids"] = whole.key_ids[:, None, None]
    if whole.rest is not None:
        tables |= _rest_tiles(whole.rest, tables["kinds"], plan)
    needed = 4 * sum(
        math.prod(tables[name].shape) for name in ("codes", "bits", "kinds") if name in tables
    )
    if needed > plan.chip.smem // 2:
        raise NotImplementedError(
            f"{NAME}: the schedule of this mask takes {needed} bytes of the {plan.chip.smem} of "
            "scalar memory"
        )
    return tables


def _schedule(kinds, plan, stretch):
    """List the tiles to visit, in a schedule of its own for every `stretch` tiles of keys."""
    xp = np if isinstance(kinds, np.ndarray) else jnp
    b, n = kinds.shape[:2]
    (tiles_q, tiles_k), (sub_q, sub_k) = plan.counts, plan.tiles.sub
    cut_q, cut_k = plan.tiles.queries // sub_q, plan.tiles.keys // sub_k
    parts = kinds.reshape(b, n, tiles_q, cut_q, tiles_k, cut_k).swapaxes(3, 4)
    least, most = parts.min((4, 5)), parts.max((4, 5))
    kind = xp.where(least == FULL, FULL, xp.where(most == EMPTY, EMPTY, PARTIAL)).astype(np.int32)
    weight = np.left_shift(1, np.arange(cut_q * cut_k, dtype=np.int32)).reshape(cut_q, cut_k)
    bits = ((parts != EMPTY) * weight).sum((4, 5)).astype(np.int32)
    stretches = math.ceil(tiles_k / stretch)
    to = ((0, 0), (0, 0), (0, 0), (0, stretches * stretch - tiles_k))
    by_stretch = lambda x: xp.pad(x, to).reshape(b, n, tiles_q, stretches, stretch).swapaxes(2, 3)
    kind_, bits = by_stretch(kind), by_stretch(bits)
    # Tiles of queries that see nothing get one EMPTY step, at the first tile of keys.
    is_lonely = (kind_ == EMPTY).all(-1, keepdims=True)
    visited = (kind_ != EMPTY) | (is_lonely & (np.arange(stretch) == 0))
    rank = visited.cumsum(-1)
    is_first, is_last = rank == 1, rank == rank[..., -1:]
    has_partial = (kind_ == PARTIAL).any(-1, keepdims=True)
    first_key = stretch * np.arange(stretches)[:, None, None] + np.arange(stretch)
    code = (
        (np.arange(tiles_q)[:, None] << _QUERY_TILE)
        + (np.minimum(first_key, tiles_k - 1) << _KEY_TILE)
        + ((is_first & has_partial) << _PREPARE)
        + (kind_ << _KIND)
        + (is_last << _LAST)
        + is_first
    ).astype(np.int32)
    flat = lambda x: x.reshape(b, n, stretches, tiles_q * stretch)
    order = xp.argsort(~flat(visited), axis=-1, stable=True)
    count = flat(visited).sum(-1, keepdims=True)
    steps = tiles_q * stretch
    if xp is np and 8 * b * n * stretches * steps > 2**16:
        # Exact sizes save memory; small schedules keep the worst one so as not to recompile.
        steps = int(count.max())
    step = np.arange(steps)
    at = xp.take_along_axis(order, xp.minimum(step, count - 1), axis=-1)
    # Steps beyond the last stay at its blocks, so that nothing is fetched, and do nothing.
    idle = -1 << _KEY_TILE
    code = xp.take_along_axis(flat(code), at, axis=-1)
    return {
        "codes": xp.where(step < count, code, code & idle),
        "bits": xp.take_along_axis(flat(bits), at, axis=-1),
        "count": xp.asarray(count.max(), np.int32),
        "kinds": kind,
    }


def _encode_bounds(lower, upper):
    """Encode intervals so that one subtraction and one comparison test both ends.

    lower <= key < upper is an unsigned comparison, key - lower < upper - lower; adding 2 ** 31 to
    both sides, with wrap-around, makes it a signed one.
    """
    xp = np if isinstance(lower, np.ndarray) and isinstance(upper, np.ndarray) else jnp
    sign = np.int32(-(2**31))
    b, n, r, t = lower.shape
    start = xp.bitwise_xor(lower.astype(np.int32), sign)
    length = xp.bitwise_xor(xp.maximum(upper - lower, 0).astype(np.int32), sign)
    return xp.stack([start, length], axis=3).reshape(b, n, 2 * r, t)


def _rest_tiles(rest, kinds, plan):
    """Evaluate the part of a mask that is no interval, on the tiles that need it."""
    tiles_q, tiles_k = plan.counts
    rows, columns = plan.tiles.queries, plan.tiles.keys
    if isinstance(kinds, np.ndarray):
        needed = (kinds == PARTIAL).any((0, 1)).ravel()
        needed[0] |= not needed.any()
        chosen = np.flatnonzero(needed)
        at = np.where(needed, np.cumsum(needed) - 1, 0)
    else:
        chosen = at = np.arange(tiles_q * tiles_k)

    def evaluate(index):
        i, j = index // tiles_k, index % tiles_k
        return rest.tile(i * rows, j * columns, rows, columns).astype(jnp.int8)

    tiles = lax.map(evaluate, jnp.asarray(chosen, jnp.int32))
    return {"rest": jnp.moveaxis(tiles, 0, 2), "rest_at": at.astype(np.int32)}


# ---- Operands -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step of a grid works; all are traced scalars.

    Attributes:
      b, n, k: example, query head and key/value head.
      i, j: tile of queries and of keys.
      rest: function of nothing that gives the index of a tile of the rest of the mask.
    """

    b: Any
    n: Any
    k: Any
    i: Any
    j: Any
    rest: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array, the block of it that a step sees, and where that block is.

    Attributes:
      array: what is passed, or the shape of a result.
      block: shape of a block, None for axes that vanish.
      at: index of the block at a `Place`.
    """

    array: Any
    block: tuple[int | None, ...]
    at: Callable[[Place], tuple]

    def spec(self, locate: Callable[..., Place]) -> pl.BlockSpec:
        """Return the specification for a grid whose steps `locate` places."""
        return pl.BlockSpec(self.block, lambda *ids: self.at(locate(*ids)))


def flat(array_bsnh: Array, length: int, width: int) -> Array:
    """Pad `[b,s,n,h]` and merge its last two axes."""
    b, s, n, h = array_bsnh.shape
    widths = ((0, 0), (0, length - s), (0, 0), (0, width - h))
    if any(after for _, after in widths):
        array_bsnh = jnp.pad(array_bsnh, widths)
    return array_bsnh.reshape(b, length, n * width)


def by_query(array: Any, plan: Plan, width: int) -> Operand:
    """An operand `[b, t, n * width]` that follows the query."""
    return Operand(array, (None, plan.tiles.queries, width), lambda at: (at.b, at.i, at.n))


def by_row(array: Any, plan: Plan) -> Operand:
    """An operand `[b, n, r, t]`: r numbers for each query, along the lanes."""
    return broadcast(array, (None, None, array.shape[2], plan.tiles.queries), (0, 0, None, "i"))


def broadcast(array: Any, block: tuple, axes: tuple) -> Operand:
    """An operand `[b|1, n|1, ...]` whose further axes follow "i", "j", or nothing (None)."""
    has_b, has_n = array.shape[0] > 1, array.shape[1] > 1

    def at(place):
        rest = [0 if axis is None else getattr(place, axis) for axis in axes[2:]]
        return (place.b if has_b else 0, place.n if has_n else 0, *rest)

    return Operand(array, block, at)


def attention_operands(plan: Plan, inputs: Mapping[str, Array]) -> dict[str, Operand]:
    """Return what every kernel reads, by name: query, key, value, mask and bias.

    Args:
      plan: the plan.
      inputs: arrays by the names of `AXES`.
    """
    (t, s), (h, hv) = plan.lengths, plan.widths
    rows, columns = plan.tiles.queries, plan.tiles.keys
    by_key = lambda array, width: Operand(
        array, (None, columns, width), lambda at: (at.b, at.j, at.k)
    )
    operands = {
        "query": by_query(flat(inputs["query"], t, h), plan, h),
        "key": by_key(flat(inputs["key"], s, h), h),
        "value": by_key(flat(inputs["value"], s, hv), hv),
    }
    if plan.is_masked and "bounds" in inputs:
        operands["bounds"] = by_row(inputs["bounds"], plan)
    if plan.is_masked and "query_ids" in inputs:
        operands["query_ids"] = by_row(inputs["query_ids"], plan)
        operands["key_ids"] = broadcast(
            inputs["key_ids"], (None, None, 1, columns), (0, 0, None, "j")
        )
    if plan.is_masked and "rest" in inputs:
        rest = inputs["rest"]
        has_b, has_n = rest.shape[0] > 1, rest.shape[1] > 1
        operands["rest"] = Operand(
            rest,
            (None, None, None, *rest.shape[3:]),
            lambda at: (at.b if has_b else 0, at.n if has_n else 0, at.rest(), 0, 0),
        )
    if "bias" in inputs:
        bias = inputs["bias"]
        sizes = [
            length if size > 1 else 1 for size, length in zip(bias.shape[2:], (t, s), strict=True)
        ]
        after = [to - size for size, to in zip(bias.shape[2:], sizes, strict=True)]
        if any(after):
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, after[0]), (0, after[1])))
        block = (rows if sizes[0] > 1 else 1, columns if sizes[1] > 1 else 1)
        axes = ("i" if sizes[0] > 1 else None, "j" if sizes[1] > 1 else None)
        operands["bias"] = broadcast(bias, (None, None, *block), (0, 0, *axes))
    return operands


def scalars(plan: Plan, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Return what goes to scalar memory, flattened: the named tables and what is always read."""
    found = {name: jnp.asarray(inputs[name]).ravel() for name in names}
    if plan.is_masked and "rest" in inputs:
        found["rest_at"] = jnp.asarray(inputs["rest_at"])
    if plan.dropout_rate:
        found["seed"] = lax.bitcast_convert_type(inputs["seed"], jnp.int32)
        found["heads"] = lax.bitcast_convert_type(inputs["heads"], jnp.int32).ravel()
    return found


def quotient(index: Any, count: int) -> Any:
    """Divide a traced index; unlike `//`, it is lowered without looking for a chip."""
    return index if count == 1 else lax.div(index, np.int32(count))


def entry(ref: Any, shape: tuple[int, ...], b: Any, n: Any, *index: Any) -> Any:
    """Read a flattened table `[b|1, n|1, ...]`."""
    at = (b if shape[0] > 1 else 0) * shape[1] + (n if shape[1] > 1 else 0)
    for size, i in zip(shape[2:], index, strict=True):
        at = at * size + i
    return ref[at]


@dataclasses.dataclass(frozen=True)
class Step:
    """An entry of a schedule, taken apart; see `make_tables`."""

    code: Any

    @property
    def i(self) -> Any:
        """Tile of queries."""
        return self.code >> _QUERY_TILE

    @property
    def j(self) -> Any:
        """Tile of keys."""
        return (self.code >> _KEY_TILE) & (_MOST_KEY_TILES - 1)

    @property
    def is_first(self) -> Any:
        """Whether it is the first of its tile of queries."""
        return (self.code >> _FIRST) & 1 == 1

    @property
    def is_last(self) -> Any:
        """Whether it is the last of its tile of queries."""
        return (self.code >> _LAST) & 1 == 1

    @property
    def prepares(self) -> Any:
        """Whether it is the first of a tile of queries that has PARTIAL tiles."""
        return (self.code >> _PREPARE) & 1 == 1

    def has_kind(self, kind: int) -> Any:
        """Whether the tile is of this kind."""
        return (self.code >> _KIND) & 3 == kind


def launch(
    plan: Plan,
    kernel: Callable[[Mapping[str, Any]], None],
    *,
    name: str,
    grid: tuple,
    parallel: int,
    locate: Callable[..., Place],
    scalar: Mapping[str, Array],
    operands: Mapping[str, Operand],
    results: Mapping[str, Operand],
    scratch: Mapping[str, Any],
) -> dict[str, Array]:
    """Run a kernel.

    Args:
      plan: the plan.
      kernel: takes references by name.
      name: of the kernel, in profiles.
      grid: sizes, of which the first `parallel` may be split over cores.
      parallel: see grid.
      locate: takes the indices of a step and the references to scalars, by position.
      scalar, operands: what goes in, by name.
      results: what comes out, by name.
      scratch: memory that steps share, by name.

    Returns:
      The results by name.
    """
    names = [*scalar, *operands, *results, *scratch]
    varying = jax.typeof(operands["query"].array).manual_axis_type
    shapes = [
        jax.ShapeDtypeStruct(x.array.shape, x.array.dtype, manual_axis_type=varying)
        for x in results.values()
    ]
    call = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalar),
            grid=grid,
            in_specs=[x.spec(locate) for x in operands.values()],
            out_specs=[x.spec(locate) for x in results.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=shapes,
        interpret=plan.interpret or False,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=plan.chip.vmem * 15 // 16,
        ),
        name=name,
    )
    found = call(*scalar.values(), *(x.array for x in operands.values()))
    return dict(zip(results, found, strict=True))


# ---- One tile of scores -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A rectangle of a tile, in static positions inside it."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def row_slice(self) -> pl.Slice:
        """Its queries."""
        return pl.ds(self.row, self.rows)

    @property
    def column_slice(self) -> pl.Slice:
        """Its keys."""
        return pl.ds(self.column, self.columns)


def whole_parts(tiles: Tiles) -> list[Part]:
    """Return the parts that a FULL tile is computed in."""
    size = tiles.sub[1]
    return [Part(0, tiles.queries, at, size) for at in range(0, tiles.keys, size)]


def sub_parts(tiles: Tiles) -> list[Part]:
    """Return the parts of a PARTIAL tile, in the order of their bits."""
    rows, columns = tiles.sub
    return [
        Part(i, rows, j, columns)
        for i in range(0, tiles.queries, rows)
        for j in range(0, tiles.keys, columns)
    ]


def visit(step: Step, bits: Any, plan: Plan, work: Callable[[Part, bool], None]) -> None:
    """Call `work(part, is_masked)` for the parts of a tile that are visible."""

    @pl.when(step.has_kind(FULL))
    def _():
        for part in whole_parts(plan.tiles):
            work(part, False)

    if not plan.is_masked:
        return

    @pl.when(step.has_kind(PARTIAL))
    def _():
        for index, part in enumerate(sub_parts(plan.tiles)):
            pl.when((bits >> index) & 1 == 1)(lambda part=part: work(part, True))


def dot(left: Array, right: Array, dimensions: Any) -> Array:
    """Multiply two matrices into float32."""
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def wide(column: Array, width: int) -> Array:
    """Repeat `[rows, 128]` along the lanes, to a multiple of 128."""
    return column if width == LANES else jnp.tile(column, (1, width // LANES))


def to_column(row: Array) -> Array:
    """Turn `[1, rows]` into `[rows, 128]`, the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def bend(product: Array, plan: Plan) -> tuple[Array, Array | float]:
    """Scale and cap `query . key`; also return the derivative of the scores in natural units."""
    if plan.softcap is None:
        return product * (plan.scale * LOG2E), plan.scale
    curve = jnp.tanh(product * (plan.scale / plan.softcap))
    return curve * (plan.softcap * LOG2E), plan.scale * (1 - curve * curve)


def _visible(key: Array, bounds: list[tuple[Array, Array]]) -> Array:
    """Whether keys lie in any of the intervals, see `_encode_bounds`."""
    seen = None
    for start, length in bounds:
        inside = key - start < length
        seen = inside if seen is None else seen | inside
    return seen


def _hide(scores: Array, parts: list[Array]) -> Array:
    for seen in parts:
        scores = jnp.where(seen, scores, -jnp.inf)
    return scores


def prepare_columns(refs: Mapping[str, Any]) -> None:
    """Turn what the mask says of every query into columns, once per tile of queries."""
    names = [name for name in ("bounds", "query_ids") if name in refs]
    rows = [(name, r) for name in names for r in range(refs[name].shape[0])]
    for slot, (name, r) in enumerate(rows):
        refs["columns"][slot] = to_column(refs[name][r : r + 1, :])


def column_count(operands: Mapping[str, Operand]) -> int:
    """Return how many columns `prepare_columns` fills."""
    names = [name for name in ("bounds", "query_ids") if name in operands]
    return sum(operands[name].array.shape[2] for name in names)


def scores_by_query(
    refs: Mapping[str, Any], plan: Plan, part: Part, key_tile: Any, is_masked: bool
) -> Array:
    """Return scores `[queries, keys]` in units of log 2, -inf where masked."""
    query, key = refs["query"][part.row_slice, :], refs["key"][part.column_slice, :]
    scores, _ = bend(dot(query, key, NT), plan)
    if "bias" in refs:
        scores = scores + _bias(refs["bias"], part).astype(jnp.float32) * LOG2E
    if not is_masked:
        return scores
    column = lambda slot: wide(refs["columns"][slot, part.row_slice, :], part.columns)
    shape, parts, slots = (part.rows, part.columns), [], 0
    if "bounds" in refs:
        first = key_tile * plan.tiles.keys + part.column
        at = first + lax.broadcasted_iota(jnp.int32, shape, 1)
        slots = refs["bounds"].shape[0]
        parts.append(_visible(at, [(column(r), column(r + 1)) for r in range(0, slots, 2)]))
    if "query_ids" in refs:
        parts.append(column(slots) == refs["key_ids"][0:1, part.column_slice])
    if "rest" in refs:
        parts.append(refs["rest"][part.row_slice, part.column_slice].astype(jnp.int32) != 0)
    return _hide(scores, parts)


def scores_by_key(
    refs: Mapping[str, Any], plan: Plan, part: Part, key_tile: Any, is_masked: bool
) -> tuple[Array, Array | float]:
    """Return scores `[keys, queries]` in units of log 2, and their slope by `query . key`.

    The tile is transposed, so that what belongs to a query lies along the lanes and needs no
    columns. The rest of the mask must be transposed, too.
    """
    query, key = refs["query"][part.row_slice, :], refs["key"][part.column_slice, :]
    scores, slope = bend(dot(key, query, NT), plan)
    shape = (part.columns, part.rows)
    if "bias" in refs:
        bias = _bias(refs["bias"], part).astype(jnp.float32) * LOG2E
        if bias.shape[0] == 1 < bias.shape[1]:
            bias = wide(to_column(bias), part.rows)
        elif bias.shape[1] == 1 < bias.shape[0]:
            bias = jnp.broadcast_to(bias, (part.rows, LANES)).T[0:1]
        elif bias.shape != (1, 1):
            bias = bias.T
        scores = scores + bias
    if not is_masked:
        return scores, slope
    parts = []
    if "bounds" in refs:
        first = key_tile * plan.tiles.keys + part.column
        at = first + lax.broadcasted_iota(jnp.int32, shape, 0)
        row = lambda r: refs["bounds"][r : r + 1, part.row_slice]
        pairs = [(row(r), row(r + 1)) for r in range(0, refs["bounds"].shape[0], 2)]
        parts.append(_visible(at, pairs))
    if "query_ids" in refs:
        ids = wide(to_column(refs["key_ids"][0:1, part.column_slice]), part.rows)
        parts.append(ids == refs["query_ids"][0:1, part.row_slice])
    if "rest" in refs:
        parts.append(refs["rest"][part.column_slice, part.row_slice].astype(jnp.int32) != 0)
    return _hide(scores, parts), slope


def _bias(ref, part):
    rows = part.row_slice if ref.shape[0] > 1 else slice(0, 1)
    columns = part.column_slice if ref.shape[1] > 1 else slice(0, 1)
    return ref[rows, columns]


def dropout_tile(
    refs: Mapping[str, Any], plan: Plan, part: Part, head: Any, at: tuple[Any, Any], query_axis: int
) -> Array:
    """Return the dropout factors of a part, with queries along the given axis.

    Args:
      refs: references by name.
      plan: the plan.
      part: the part.
      head: index of example and head among those that this device holds.
      at: tile of queries and of keys.
      query_axis: 0 or 1.
    """
    seed = [refs["seed"][i].astype(jnp.uint32) for i in range(3)]
    positions = []
    for first, size, axis in (
        (at[0] * plan.tiles.queries + part.row, part.rows, query_axis),
        (at[1] * plan.tiles.keys + part.column, part.columns, 1 - query_axis),
    ):
        shape = (size, 1) if axis == 0 else (1, size)
        positions.append((first + lax.broadcasted_iota(jnp.int32, shape, axis)).astype(jnp.uint32))
    heads = refs["heads"][head].astype(jnp.uint32)
    return dropout_factor(seed, plan.dropout_rate, heads, *positions)
