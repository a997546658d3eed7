# SPDX-License-Identifier: Apache-2.0
"""Backward of flash attention for TPUs, and sums over tiles of weights or their gradients.

Weights are computed again from the log-sum-exp; with shift = dout . out - dlse,

    p = exp(z - lse)                     dv = p^T . dout
    dz = p * (dout . v - shift)          dk = scale dz^T . q          dq = scale dz . k

One kernel does all three in the order of the forward pass: gradients of a tile of queries are
summed while its tiles of keys go by, and gradients of keys stay in memory, all of them or one
stretch after another, until every query and every head of their group has passed. Tiles are
transposed, `[keys, queries]`, so that lse and shift are rows and nothing is summed across lanes.

The gradient of a bias and the mass that keys receive are sums over whole axes of dz and p. They
have a kernel of their own, whose grid takes the axes that are summed last.
"""

import functools
from collections.abc import Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from attnjax.ops.mask import FULL, PARTIAL
from attnjax.ops.pallas_tpu_tile import (
    LANES,
    LOG2E,
    NN,
    NT,
    TN,
    Operand,
    Place,
    Plan,
    Step,
    attention_operands,
    by_query,
    by_row,
    dot,
    dropout_tile,
    entry,
    flat,
    launch,
    quotient,
    scalars,
    scores_by_key,
    visit,
    whole_parts,
)
from attnjax.typing import Array


def backward(plan: Plan, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the gradients "dquery", "dkey", "dvalue", and "dbias" if there is a bias.

    Args:
      plan: the plan.
      inputs: those of the forward kernel, and, in the names of the module's equations, "lse"
        `[b,n,t]` float32, "dout" `[b,t,n,hv]` and "shift" `[b,n,t]` float32.
    """
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    b, _, n, _ = query.shape
    k = key.shape[2]
    group = n // k
    (t, s), (h, hv) = plan.lengths, plan.widths
    rows, columns, resident = plan.tiles.queries, plan.tiles.keys, plan.tiles.resident
    prefix = "stretch_" if "stretch_codes" in inputs else ""
    codes = inputs[prefix + "codes"].shape
    stretches = codes[2]
    held = min(resident, s)
    operands = _operands(plan, inputs)
    of_keys = jnp.float32 if plan.is_partial else key.dtype
    dquery_dtype = of_keys if stretches == 1 else jnp.float32
    dquery = jax.ShapeDtypeStruct((stretches, b, t, n * h), dquery_dtype)
    # Where a stretch starts is known to `at` by the tile of keys it is at.
    tiles_held = held // columns
    at_stretch = lambda at: quotient(at.j, tiles_held)
    results = {
        "dquery": Operand(
            dquery, (None, None, rows, h), lambda at: (at_stretch(at), at.b, at.i, at.n)
        ),
        "dkey": Operand(
            jax.ShapeDtypeStruct((b, stretches * held, k * h), of_keys),
            (None, held, h),
            lambda at: (at.b, at_stretch(at), at.k),
        ),
        "dvalue": Operand(
            jax.ShapeDtypeStruct((b, stretches * held, k * hv), of_keys),
            (None, held, hv),
            lambda at: (at.b, at_stretch(at), at.k),
        ),
    }
    is_turned = plan.chip.generation >= 6
    scratch = {
        "query_sum": pltpu.VMEM((h, rows) if is_turned else (rows, h), jnp.float32),
        "key_sum": pltpu.VMEM((held, h), jnp.float32),
        "value_sum": pltpu.VMEM((held, hv), jnp.float32),
    }
    scalar = scalars(plan, inputs, (prefix + "codes", prefix + "bits"))

    def locate(b, k, stretch, member, index, codes_ref, bits_ref, *refs):
        head = k * group + member
        step = Step(entry(codes_ref, codes, b, head, stretch, index))
        tile = step.i * plan.counts[1] + step.j
        return Place(b, head, k, step.i, step.j, lambda: refs[0][tile])

    def kernel(refs):
        b, k, stretch, member, index = (pl.program_id(axis) for axis in range(5))
        head = k * group + member
        step = Step(entry(refs[prefix + "codes"], codes, b, head, stretch, index))
        bits = entry(refs[prefix + "bits"], codes, b, head, stretch, index)
        is_last_step = index == pl.num_programs(4) - 1

        @pl.when((index == 0) & (member == 0))
        def _():
            refs["key_sum"][...] = jnp.zeros((held, h), jnp.float32)
            refs["value_sum"][...] = jnp.zeros((held, hv), jnp.float32)

        @pl.when(step.is_first)
        def _():
            refs["query_sum"][...] = jnp.zeros(refs["query_sum"].shape, jnp.float32)

        def work(part, is_masked):
            weights, dscores, kept, slope = _gradients(
                refs, plan, part, (step.i, step.j), b * n + head, is_masked
            )
            del weights
            rows, first = part.row_slice, (step.j - stretch * tiles_held) * columns
            keys = pl.ds(pl.multiple_of(first + part.column, LANES), part.columns)
            query, key = refs["query"][rows, :], refs["key"][part.column_slice, :]
            dproduct = dscores if plan.softcap is None else dscores * slope
            dproduct = dproduct.astype(key.dtype)
            refs["value_sum"][keys, :] += dot(kept.astype(query.dtype), refs["dout"][rows, :], NN)
            refs["key_sum"][keys, :] += dot(dproduct, query, NN)
            if is_turned:
                refs["query_sum"][:, rows] += dot(key, dproduct, TN)
            else:
                refs["query_sum"][rows, :] += dot(dproduct.T, key, NN)

        visit(step, bits, plan, work)
        scale = plan.scale if plan.softcap is None else 1.0

        @pl.when(step.is_last)
        def _():
            total = refs["query_sum"][...]
            total = total.T if is_turned else total
            refs["dquery"][...] = (total * scale).astype(refs["dquery"].dtype)

        @pl.when(is_last_step & (member == group - 1))
        def _():
            refs["dkey"][...] = (refs["key_sum"][...] * scale).astype(refs["dkey"].dtype)
            refs["dvalue"][...] = refs["value_sum"][...].astype(refs["dvalue"].dtype)

    found = launch(
        plan,
        kernel,
        name="attention_backward",
        grid=(b, k, stretches, group, jnp.asarray(inputs[prefix + "count"])),
        parallel=3,
        locate=locate,
        scalar=scalar,
        operands=operands,
        results=results,
        scratch=scratch,
    )
    dquery = found["dquery"][0] if stretches == 1 else found["dquery"].sum(axis=0)
    cut = lambda array, like: array.reshape(b, array.shape[1], like.shape[2], -1)[
        :, : like.shape[1], :, : like.shape[3]
    ].astype(of_keys)
    gradients = {
        "dquery": cut(dquery, query),
        "dkey": cut(found["dkey"], key),
        "dvalue": cut(found["dvalue"], value),
    }
    if "bias" in inputs:
        bias = inputs["bias"]
        dbias = _sum_tiles(plan, bias.shape, operands, inputs)
        gradients["dbias"] = dbias.astype(bias.dtype)
    return gradients


def key_mass(plan: Plan, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return "key_mass" `[b,n,s]` float32, the mass that every key receives.

    Args:
      plan: the plan.
      inputs: those of the forward kernel, and "lse" `[b,n,t]` float32 of the weights that are
        summed.
    """
    b, _, n, _ = inputs["query"].shape
    shape = (b, n, 1, plan.shape[1])
    return {"key_mass": _sum_tiles(plan, shape, _operands(plan, inputs), inputs)[:, :, 0]}


def _operands(plan, inputs):
    """Return the operands of tiles `[keys, queries]`; without dout, of their weights only."""
    inputs = dict(inputs)
    if "rest" in inputs:
        inputs["rest"] = inputs["rest"].swapaxes(3, 4)
    operands = attention_operands(plan, inputs)
    rows = [inputs["lse"] * LOG2E]
    if "dout" in inputs:
        hv = plan.widths[1]
        dout = inputs["dout"].astype(inputs["query"].dtype)
        operands["dout"] = by_query(flat(dout, plan.lengths[0], hv), plan, hv)
        rows.append(inputs["shift"])
    else:
        del operands["value"]
    table = jnp.stack(rows, axis=2)
    after = plan.lengths[0] - table.shape[3]
    operands["rows"] = by_row(jnp.pad(table, ((0, 0), (0, 0), (0, 0), (0, after))), plan)
    return operands


def _gradients(refs, plan, part, at, head, is_masked):
    """Return weights, gradients of scores, weights after dropout, and slope of a part."""
    scores, slope = scores_by_key(refs, plan, part, at[1], is_masked)
    weights = jnp.exp2(scores - refs["rows"][0:1, part.row_slice])
    dweights = dot(refs["value"][part.column_slice, :], refs["dout"][part.row_slice, :], NT)
    kept = weights
    if plan.dropout_rate:
        factor = dropout_tile(refs, plan, part, head, at, 1)
        kept, dweights = weights * factor, dweights * factor
    return weights, weights * (dweights - refs["rows"][1:2, part.row_slice]), kept, slope


def _sum_tiles(plan, shape, operands, inputs):
    """Sum gradients of scores, or weights if there is no gradient, over axes of `[b,n,t,s]`.

    Args:
      plan: the plan.
      shape: that of the result; where it has 1, the axis is summed.
      operands: from `_operands`.
      inputs: as for `backward`.

    Returns:
      float32 of this shape.
    """
    b, _, n, _ = inputs["query"].shape
    group = n // inputs["key"].shape[2]
    (t, s), (rows, columns) = plan.lengths, (plan.tiles.queries, plan.tiles.keys)
    sums_queries = shape[2] == 1
    sums_keys = shape[3] == 1 and not sums_queries
    lengths = {"b": b, "n": n, "i": plan.counts[0], "j": plan.counts[1]}
    is_summed = {
        "b": shape[0] < b, "n": shape[1] < n, "i": sums_queries, "j": sums_keys
    }  # fmt: skip
    order = sorted("bnij", key=lambda axis: is_summed[axis])
    if sums_queries:
        scratch, height, length, block = (columns, LANES), 1, s, (1, columns)
    elif sums_keys:
        scratch, height, length, block = (1, rows), 1, t, (1, rows)
    else:
        scratch, height, length, block = (columns, rows), t, s, (rows, columns)
    kept = lambda axis, index: 0 if is_summed[axis] else index
    along = (lambda at: (0, at.j)) if sums_queries else (lambda at: (0, at.i))
    if not sums_queries and not sums_keys:
        along = lambda at: (at.i, at.j)
    result = Operand(
        jax.ShapeDtypeStruct((shape[0], shape[1], height, length), jnp.float32),
        (None, None, *block),
        lambda at: (kept("b", at.b), kept("n", at.n), *along(at)),
    )
    kinds = inputs["kinds"].shape
    scalar = scalars(plan, inputs, ("kinds",))

    def locate(*ids):
        at = dict(zip(order, ids[:4], strict=True))
        tile = at["i"] * plan.counts[1] + at["j"]
        head = quotient(at["n"], group)
        return Place(at["b"], at["n"], head, at["i"], at["j"], lambda: ids[5][tile])

    def kernel(refs):
        at = {axis: pl.program_id(place) for place, axis in enumerate(order)}
        summed = [axis for axis in order if is_summed[axis]]
        is_first = is_last = True
        for axis in summed:
            is_first &= at[axis] == 0
            is_last &= at[axis] == lengths[axis] - 1
        kind = entry(refs["kinds"], kinds, at["b"], at["n"], at["i"], at["j"])
        total = refs["total"]

        @pl.when(is_first)
        def _():
            total[...] = jnp.zeros(total.shape, jnp.float32)

        def add(is_masked):
            for part in whole_parts(plan.tiles):
                if "value" in refs:
                    tile, head = (at["i"], at["j"]), at["b"] * n + at["n"]
                    found = _gradients(refs, plan, part, tile, head, is_masked)[1]
                else:
                    scores, _ = scores_by_key(refs, plan, part, at["j"], is_masked)
                    found = jnp.exp2(scores - refs["rows"][0:1, part.row_slice])
                if sums_queries:
                    pieces = [found[:, i : i + LANES] for i in range(0, rows, LANES)]
                    total[part.column_slice, :] += functools.reduce(jnp.add, pieces)
                elif sums_keys:
                    total[...] += found.sum(axis=0, keepdims=True)
                else:
                    total[part.column_slice, :] += found

        pl.when(kind == FULL)(lambda: add(False))
        if plan.is_masked:
            pl.when(kind == PARTIAL)(lambda: add(True))

        @pl.when(is_last)
        def _():
            found = total[...]
            if sums_queries:
                found = found.sum(axis=1, keepdims=True)
                found = jnp.broadcast_to(found, (columns, LANES)).T[0:1]
            elif not sums_keys:
                found = found.T
            refs["result"][...] = found

    found = launch(
        plan,
        kernel,
        name="attention_sums",
        grid=tuple(lengths[axis] for axis in order),
        parallel=sum(not summed for summed in is_summed.values()),
        locate=locate,
        scalar=scalar,
        operands=operands,
        results={"result": result},
        scratch={"total": pltpu.VMEM(scratch, jnp.float32)},
    )["result"]
    if sums_keys:
        found = found.swapaxes(2, 3)
    found = found[:, :, : plan.shape[0], : plan.shape[1]]
    return found.sum(axis=3, keepdims=True) if sums_queries and shape[3] == 1 else found
