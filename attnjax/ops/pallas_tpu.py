# SPDX-License-Identifier: Apache-2.0
"""Flash attention for TPUs in Pallas: forward here, backward in `pallas_tpu_bwd`.

One step of the grid is one visible tile. For a tile of queries, over its tiles of keys, with
scores z in units of log 2, running maximum m and sum l:

    m' = max(m, max_s z)      p = 2 ** (z - m')      a = 2 ** (m - m')
    l' = a l + sum_s p        acc' = a acc + p . value

    out = acc / l             lse = ln(2) m + ln(l)          max p = 1 / l

The sum l is kept as 128 partial sums, one per lane, so that nothing is summed across lanes before
the end; only the maximum is. Entropy and the mass of token sets are running sums of the same kind,
rescaled like l; with x = z - m:

    u' = a (u + (m - m') l) + sum_s p x                      entropy = ln(l) - ln(2) u / l

Numbers per query (lse and statistics) leave as rows along the lanes, which takes 4 bytes each and
not the 512 of a column.

Products of float32 inputs follow `jax.default_matmul_precision`, as everywhere on TPUs.

On several chips the kernels run on the examples and heads of each. They must know the mesh: it has
to be set with `jax.set_mesh`, and its axes have the names in `attnjax.ops.partition.MESH_AXES`.

No kernel here has yet run on a TPU. Tests run them in Pallas's emulation on CPU and compile them
with libtpu for v4, v5e, v5p and v6e.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from attnjax.ops.attention import AttentionOutput, Call
from attnjax.ops.dropout import dropout_seed
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.pallas_tpu_bwd import backward, key_mass
from attnjax.ops.pallas_tpu_tile import (
    EMPTY_MAX,
    LANES,
    LN2,
    NAME,
    NN,
    Place,
    Plan,
    Step,
    Tiles,
    attention_operands,
    broadcast,
    by_query,
    by_row,
    choose_tiles,
    column_count,
    dot,
    dropout_tile,
    entry,
    find_chip,
    interpretation,
    interpreted,
    launch,
    make_tables,
    prepare_columns,
    quotient,
    run,
    scalars,
    scores_by_query,
    visit,
    wide,
)
from attnjax.ops.partition import MESH_AXES, large_axes, vary_alike
from attnjax.ops.reference import first_token_scores
from attnjax.ops.statistics import TokenMass, name_of
from attnjax.typing import Array

__all__ = ["Tiles", "attend", "interpreted"]


def attend(call: Call, tiles: Tiles | None = None) -> AttentionOutput:
    """Serve a call on a TPU.

    Args:
      call: the checked arguments.
      tiles: tile sizes, for tests and tuning. Chosen from shapes and chip if None.

    Returns:
      An `AttentionOutput` without probabilities and scores.

    Raises:
      NotImplementedError: there is no TPU; the ambient mesh has an axis of unknown use; the inputs
        are neither float32 nor bfloat16; the mask needs too long a schedule; or the call asks for
        elementwise normalizers, bias objects, probabilities, scores or edits.
    """
    plan, arrays = _prepare(call, tiles)
    out, lse, rows, mass = _attend_jit(plan, *arrays)
    statistics = {}
    if call.statistics:
        statistics = jax.lax.stop_gradient(_finish(call, lse, rows, mass))
    return AttentionOutput(out=out, lse=lse if call.return_lse else None, statistics=statistics)


def gradients(call: Call, results: tuple, cotangents: tuple, tiles: Tiles | None = None) -> tuple:
    """Return a part's contribution to gradients, see `attention.serve_gradients`."""
    plan, arrays = _prepare(dataclasses.replace(call, statistics=()), tiles)
    return _gradients_jit(plan, *vary_alike((arrays, results, cotangents))[1])


def _prepare(call: Call, tiles: Tiles | None) -> tuple[Plan, tuple]:
    """Return the plan of a call and the arguments of its kernels."""
    chip = find_chip()
    call.refuse(NAME, "normalizer", "bias objects", "return_probabilities", "return_scores", "edit")
    call.refuse(NAME, "place")
    b, n, t, s = call.scores_shape
    dtype = call.query.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{NAME}: {dtype} inputs are not served")
    if b == 0 or t == 0:
        raise NotImplementedError(f"{NAME}: empty inputs are not served")
    _check_mesh()
    shape = (t, s, call.query.shape[3], call.value.shape[3])
    if tiles is None:
        bias = 0 if call.bias is None else call.bias.dtype.itemsize
        extra = bias + (call.visibility.rest is not None)
        found = call.tuning.find("pallas_tpu", call)
        tiles = choose_tiles(shape, dtype, chip, extra=extra, found=found)
    plan = Plan(
        tiles=tiles,
        shape=shape,
        scale=call.scale,
        softcap=call.softcap,
        dropout_rate=call.dropout_rate,
        chip=chip,
        is_masked=not call.visibility.pad(t, s, *_padded(shape, tiles)).is_full,
        has_largest="max_probability" in call.statistics,
        has_entropy="entropy" in call.statistics,
        has_key_mass="key_mass" in call.statistics,
        interpret=interpretation(),
        is_partial=call.is_partial,
    )
    extra, tokens = {}, _tokens(call)
    if call.dropout_rate:
        extra["seed"] = dropout_seed(call.dropout_key)
        extra["heads"] = np.arange(b * n, dtype=np.uint32).reshape(b, n, 1)
    if tokens:
        masses = [jnp.broadcast_to(x.indicator, (b, s)).astype(jnp.float32) for x in tokens]
        extra["indicators"] = jnp.stack(masses, axis=1)[:, None]
    if plan.has_key_mass and call.extra_logit is not None:
        extra["extra_logit"] = call.extra_logit
    others = make_tables(call.visibility, plan) | extra
    return plan, vary_alike((call.query, call.key, call.value, call.bias, others))[1]


def _check_mesh():
    """Refuse a mesh over which inputs may be divided in a way that kernels cannot keep."""
    known = {name for names in MESH_AXES.values() for name in names}
    if unknown := sorted(set(large_axes(jax.sharding.get_abstract_mesh())) - known):
        raise NotImplementedError(
            f"{NAME}: mesh axis {unknown[0]!r} is none for examples {MESH_AXES['batch']} or heads "
            f"{MESH_AXES['heads']}: use parallel attention, or call this inside shard_map over it"
        )


def _padded(shape, tiles):
    return (
        tiles.queries * math.ceil(shape[0] / tiles.queries),
        tiles.keys * math.ceil(shape[1] / tiles.keys),
    )


def _tokens(call):
    return [x for x in call.statistics if isinstance(x, TokenMass)]


def _finish(call, lse, rows, mass):
    """Name the statistics, and let the extra logit of the denominator take its share."""
    share, log_share = 1.0, 0.0
    if call.extra_logit is not None:
        log_share = lse - jnp.logaddexp(lse, call.extra_logit.astype(lse.dtype))
        share = jnp.exp(log_share)
    found, row = {}, iter(rows[:, :, i] for i in range(rows.shape[2]))
    largest, entropy = (
        next(row) if name in call.statistics else None for name in ("max_probability", "entropy")
    )
    for statistic in call.statistics:
        if isinstance(statistic, TokenMass):
            value = share * next(row)
        elif statistic == "max_probability":
            value = share * largest
        elif statistic == "entropy":
            kept = jnp.where(share > 0, share * log_share, 0.0)
            value = jnp.where(lse > EMPTY_LSE, share * entropy - kept, 0.0)
        elif statistic == "first_token_mass":
            # The scores of one key are cheap to compute again.
            mass_of_first = jnp.exp(first_token_scores(call) - lse)
            value = share * jnp.where(lse > EMPTY_LSE, mass_of_first, 0.0)
        else:
            value = mass
        found[name_of(statistic)] = value
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, bias, others):
    return _attend_fwd(plan, query, key, value, bias, others)[0]


def _inputs(query, key, value, bias, others):
    inputs = {"query": query, "key": key, "value": value} | others
    return inputs if bias is None else inputs | {"bias": bias}


def _attend_fwd(plan, *arrays):
    """Return out `[b,t,n,hv]`, lse `[b,n,t]`, other rows `[b,n,r,t]`, and key mass or None."""
    inputs = _inputs(*arrays)
    found = run(forward, plan, inputs)
    lse, mass = found["rows"][:, :, 0], None
    if plan.has_key_mass:
        total = lse
        if "extra_logit" in inputs:
            total = jnp.logaddexp(lse, inputs["extra_logit"].astype(lse.dtype))
        mass = run(key_mass, plan, inputs | {"lse": total})["key_mass"]
    return (found["out"], lse, found["rows"][:, :, 1:], mass), (inputs, found["out"], lse)


def _attend_bwd(plan, saved, cotangents):
    inputs, out, lse = saved
    dout, dlse = cotangents[:2]
    shift = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32) - dlse
    found = run(backward, plan, inputs | {"lse": lse, "dout": dout, "shift": shift})
    return found["dquery"], found["dkey"], found["dvalue"], found.get("dbias"), None


_attend.defvjp(_attend_fwd, _attend_bwd)
_attend_jit = jax.jit(_attend, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _gradients_jit(plan, arrays, results, cotangents):
    return _attend_bwd(plan, (_inputs(*arrays), *results), (*cotangents, None))[:4]


def forward(plan: Plan, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run the forward kernel.

    Args:
      plan: the plan.
      inputs: query, key, value and what else there is, by the names of `AXES`.

    Returns:
      "out" `[b,t,n,hv]` and "rows" `[b,n,r,t]`: lse, largest weight, entropy, masses of token sets,
      of these what is wanted.
    """
    b, _, n, _ = inputs["query"].shape
    group = n // inputs["key"].shape[2]
    (t, _), (_, hv) = plan.lengths, plan.widths
    rows = plan.tiles.queries
    dtype = jnp.float32 if plan.is_partial else inputs["query"].dtype
    operands = attention_operands(plan, inputs)
    tokens = 0
    if "indicators" in inputs:
        masses = inputs["indicators"]
        tokens = masses.shape[2]
        after = plan.lengths[1] - masses.shape[3]
        masses = jnp.pad(masses, ((0, 0), (0, 0), (0, 0), (0, after)))
        block = (None, None, tokens, plan.tiles.keys)
        operands["indicators"] = broadcast(masses, block, (0, 0, None, "j"))
    height = 1 + plan.has_largest + plan.has_entropy + tokens
    results = {
        "out": by_query(jax.ShapeDtypeStruct((b, t, n * hv), dtype), plan, hv),
        "rows": by_row(jax.ShapeDtypeStruct((b, n, height, t), jnp.float32), plan),
    }
    column = pltpu.VMEM((rows, LANES), jnp.float32)
    scratch = {"acc": pltpu.VMEM((rows, hv), jnp.float32), "max": column, "sum": column}
    if plan.has_entropy:
        scratch["entropy"] = column
    if tokens:
        scratch["tokens"] = pltpu.VMEM((tokens, rows, LANES), jnp.float32)
    if columns := column_count(operands):
        scratch["columns"] = pltpu.VMEM((columns, rows, LANES), jnp.int32)
    scalar = scalars(plan, inputs, ("codes", "bits"))
    codes = inputs["codes"].shape

    def locate(b, n, index, codes_ref, bits_ref, *refs):
        step = Step(entry(codes_ref, codes, b, n, 0, index))
        tile = step.i * plan.counts[1] + step.j
        return Place(b, n, quotient(n, group), step.i, step.j, lambda: refs[0][tile])

    def kernel(refs):
        b, head, index = (pl.program_id(axis) for axis in range(3))
        step = Step(entry(refs["codes"], codes, b, head, 0, index))
        bits = entry(refs["bits"], codes, b, head, 0, index)

        @pl.when(step.is_first)
        def _():
            refs["max"][...] = jnp.full((rows, LANES), EMPTY_MAX, jnp.float32)
            for name in ("acc", "sum", "entropy", "tokens"):
                if name in refs:
                    refs[name][...] = jnp.zeros(refs[name].shape, jnp.float32)

        if "columns" in refs:
            pl.when(step.prepares)(lambda: prepare_columns(refs))

        def work(part, is_masked):
            factor = None
            if plan.dropout_rate:
                at = step.i, step.j
                factor = dropout_tile(refs, plan, part, b * n + head, at, 0)
            _accumulate(refs, scores_by_query(refs, plan, part, step.j, is_masked), part, factor)

        visit(step, bits, plan, work)
        pl.when(step.is_last)(lambda: _write(refs, plan))

    found = launch(
        plan,
        kernel,
        name="attention_forward",
        grid=(b, n, jnp.asarray(inputs["count"])),
        parallel=2,
        locate=locate,
        scalar=scalar,
        operands=operands,
        results=results,
        scratch=scratch,
    )
    out = found["out"].reshape(b, t, n, hv)
    return {
        "out": out[:, : plan.shape[0], :, : plan.shape[3]],
        "rows": found["rows"][..., : plan.shape[0]],
    }


def _accumulate(refs, scores, part, factor):
    """Add a part of a tile to the running sums."""
    rows = part.row_slice
    value = refs["value"][part.column_slice, :]
    old = refs["max"][rows, :]
    new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    exponent = scores - wide(new, part.columns)
    weights = jnp.exp2(exponent)
    shrink = jnp.exp2(old - new)
    if "entropy" in refs:
        # Masked scores are -inf; their weight is zero, so any finite exponent will do.
        moment = _by_lane(weights * jnp.maximum(exponent, EMPTY_MAX))
        moved = refs["entropy"][rows, :] + (old - new) * refs["sum"][rows, :]
        refs["entropy"][rows, :] = shrink * moved + moment
    if "tokens" in refs:
        for i in range(refs["tokens"].shape[0]):
            mass = weights * refs["indicators"][i : i + 1, part.column_slice]
            refs["tokens"][i, rows, :] = shrink * refs["tokens"][i, rows, :] + _by_lane(mass)
    refs["max"][rows, :] = new
    refs["sum"][rows, :] = shrink * refs["sum"][rows, :] + _by_lane(weights)
    kept = weights if factor is None else weights * factor
    width = refs["acc"].shape[1]
    refs["acc"][rows, :] = wide(shrink, width) * refs["acc"][rows, :] + dot(
        kept.astype(value.dtype), value, NN
    )


def _write(refs, plan):
    """Divide by the sums and write the results of a tile of queries."""
    total = refs["sum"][...].sum(axis=1, keepdims=True)
    is_empty = total == 0
    inverse = jnp.where(is_empty, 0.0, 1 / jnp.where(is_empty, 1.0, total))
    inverse = jnp.broadcast_to(inverse, refs["max"].shape)
    refs["out"][...] = (refs["acc"][...] * wide(inverse, refs["acc"].shape[1])).astype(
        refs["out"].dtype
    )
    log_total = jnp.log(jnp.where(is_empty, 1.0, total))
    columns = [jnp.where(is_empty, EMPTY_LSE, LN2 * refs["max"][...] + log_total)]
    if plan.has_largest:
        columns.append(inverse)
    if "entropy" in refs:
        moment = refs["entropy"][...].sum(axis=1, keepdims=True)
        columns.append(jnp.where(is_empty, 0.0, log_total - LN2 * moment * inverse))
    if "tokens" in refs:
        for i in range(refs["tokens"].shape[0]):
            columns.append(refs["tokens"][i].sum(axis=1, keepdims=True) * inverse)
    lane = jax.lax.broadcasted_iota(jnp.int32, inverse.shape, 1)
    table = columns[0]
    for i, column in enumerate(columns[1:], 1):
        table = jnp.where(lane == i, column, table)
    refs["rows"][...] = table.T[: len(columns)]


def _by_lane(array: jax.Array) -> jax.Array:
    """Sum the groups of 128 lanes of `[rows, columns]`."""
    parts = [array[:, at : at + LANES] for at in range(0, array.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)
