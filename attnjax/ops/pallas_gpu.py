# SPDX-License-Identifier: Apache-2.0
"""Flash attention for GPUs, in Pallas by way of Triton: forward.

One program owns a tile of queries of one head and walks the tiles of keys that the mask leaves it,
FULL ones without any masking, with running maximum m and sum l in base 2:

    m' = max(m, max_s x)      w = 2^(factor (x - m'))      l' = 2^(factor (m - m')) l + sum_s w
    acc' = 2^(factor (m - m')) acc + w . value              out = acc / l

The log-sum-exp is kept as the pair m and log2 l, whose difference matters where scores are large.

Statistics of rows are further sums over w. The mass that keys receive is a second kernel, which
owns a tile of keys and knows the final log-sum-exp.

The backward pass is in `pallas_gpu_bwd`. Second derivatives and forward mode are refused. Products
of float32 follow `jax.default_matmul_precision`, as everywhere in JAX: TF32 unless it says
"highest".

Tests run the kernels in Pallas's emulation on CPU and lower them for CUDA; `pytest -m gpu` runs
them on a GPU. They have run on an H100 (BUILD_NOTES, "Attention on an H100"); for compute
capability 8.0, 8.6 and 10.0 they were only compiled.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from attnjax.ops import pallas_gpu_bwd
from attnjax.ops.attention import AttentionOutput, Call
from attnjax.ops.dropout import dropout_seed
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.pallas_gpu_tile import (
    LOG2E,
    Plan,
    Tile,
    Tiles,
    factor,
    launch,
    load_rows,
    load_vector,
    padded,
    positions,
    product,
    result_dtype,
    run,
    split,
    store_rows,
    store_vector,
    tables,
    visit,
)
from attnjax.ops.statistics import TokenMass, name_of
from attnjax.typing import Array

LN2 = math.log(2)
WIDEST = 256
"""Largest width of a head."""


def attend(
    call: Call, tiles: Tiles | None = None, *, interpret: bool | None = None
) -> AttentionOutput:
    """Serve a call on a GPU.

    Args:
      call: the checked arguments.
      tiles: for tests and tuning; chosen from the shapes if None.
      interpret: True emulates the kernels on any backend; False makes kernels for a GPU even if
        there is none, to lower them; None, as the public function has it, refuses without a GPU.

    Returns:
      An `AttentionOutput` without probabilities and scores.

    Raises:
      NotImplementedError: there is no GPU that can, or the call asks for what kernels do not do:
        elementwise normalizers, probabilities, scores, edits, biases that are functions, 64-bit
        inputs, heads wider than 256.
    """
    plan, found, extra = _prepare(call, tiles, interpret)
    return _finish(call, plan, *_attend_jit(plan, *_arrays(call), found, extra), found)


def gradients(
    call: Call,
    results: tuple,
    cotangents: tuple,
    tiles: Tiles | None = None,
    *,
    interpret: bool | None = None,
) -> tuple:
    """Return a part's contribution to gradients, see `attention.serve_gradients`."""
    call = dataclasses.replace(call, statistics=())
    plan, found, extra = _prepare(call, tiles, interpret)
    return _gradients_jit(plan, _arrays(call), found, extra, results, cotangents)


def _prepare(call, tiles, interpret):
    """Return the plan of a call, its tables, and what dropout and statistics need."""
    name = "pallas_gpu"
    if interpret is None:
        _check_device(name)
    call.refuse(name, "normalizer", "bias objects", "return_probabilities", "return_scores", "edit")
    call.refuse(name, "place")
    _check_call(name, call)
    plan = _make_plan(call, tiles or choose_tiles(call), bool(interpret))
    found = tables(call.visibility, plan)
    b, n, _, _ = call.scores_shape
    extra = {}
    if call.dropout_rate:
        extra["seed"] = dropout_seed(call.dropout_key)
        extra["heads"] = np.arange(b * n, dtype=np.uint32).reshape(b, n)
    indicators = _indicators(call)
    if indicators is not None:
        extra["indicators"] = indicators
    return plan, found, extra


def _arrays(call):
    return call.query, call.key, call.value, call.bias


def choose_tiles(call: Call) -> Tiles:
    """Choose tiles for a call: those of its tuning table, or by a rule.

    Chosen with the compiler, except for 16-bit heads of up to 128 on an H100: with these, kernels
    for compute capability 8.0 and 9.0 hardly spill registers, and fit the 99 KiB of shared memory
    that all GPUs since Ampere have (on Hopper, with its 227 KiB, some take more). There, a program
    of four warps is one group of the matrix unit: the forward pass took 0.72 and the backward pass
    less than half of the time with eight.
    """
    _, _, t, s = call.scores_shape
    fit = lambda tile: (min(tile[0], padded(t)), min(tile[1], padded(s)))
    if (found := call.tuning.find("pallas_gpu", call)) is not None:
        tiles = Tiles(**found)
        return dataclasses.replace(tiles, forward=fit(tiles.forward), backward=fit(tiles.backward))
    widest = max(padded(call.query.shape[3]), padded(call.value.shape[3]))
    if call.query.dtype.itemsize == 4:
        chosen = ((64, 32), (32, 32), 8, 8) if widest <= 128 else ((32, 16), (16, 16), 8, 8)
    elif widest <= 64:
        chosen = ((128, 64), (64, 64), 8, 4)
    elif widest <= 128:
        warps = 4 if capability() >= 9 else 8
        chosen = ((128, 64), (64, 64), warps, warps)
    else:
        chosen = ((64, 32), (32, 32), 8, 8)
    forward, backward, *warps = chosen
    return Tiles(fit(forward), fit(backward), *warps)


def _make_plan(call, tiles, interpret):
    return Plan(
        t=call.query.shape[1],
        s=call.key.shape[1],
        width=call.query.shape[3],
        value_width=call.value.shape[3],
        group=call.query.shape[2] // call.key.shape[2],
        scale=call.scale,
        softcap=call.softcap,
        dropout_rate=call.dropout_rate,
        tiles=tiles,
        entropy="entropy" in call.statistics,
        max_probability="max_probability" in call.statistics,
        is_exact=call.query.dtype == jnp.float32,
        interpret=interpret,
        is_partial=call.is_partial,
    )


def capability() -> float:
    """Return the compute capability of the first device; 8.0 where it does not say."""
    said = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(said) if said.replace(".", "", 1).isdigit() else 8.0


def _check_device(name):
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"{name}: needs a GPU, not {jax.default_backend()}")
    if capability() < 8:
        raise NotImplementedError(f"{name}: needs compute capability 8.0, not {capability()}")


def _check_call(name, call):
    h, hv = call.query.shape[3], call.value.shape[3]
    if max(h, hv) > WIDEST:
        raise NotImplementedError(f"{name}: heads wider than {WIDEST}, here {h} and {hv}")
    for what, array in (("inputs", call.query), ("bias", call.bias)):
        if array is not None and array.dtype.name not in ("float32", "bfloat16", "float16"):
            raise NotImplementedError(f"{name}: {array.dtype} {what} are not served")
    if call.query.shape[0] == 0:
        raise NotImplementedError(f"{name}: an empty batch is not served")


def _indicators(call):
    """Stack what sums of weights are wanted over, `[b|1, z, s]` float32."""
    rows = []
    for statistic in call.statistics:
        if isinstance(statistic, TokenMass):
            rows.append(jnp.asarray(statistic.indicator, jnp.float32))
        elif statistic == "first_token_mass":
            rows.append(jnp.asarray(np.arange(call.key.shape[1])[None] == 0, jnp.float32))
    if not rows:
        return None
    b = max(row.shape[0] for row in rows)
    rows = [jnp.broadcast_to(row, (b, row.shape[1])) for row in rows]
    return jax.lax.stop_gradient(jnp.stack(rows, axis=1))


def _finish(call, plan, out, lse, rows, found):
    """Make statistics of what the kernels summed up."""
    statistics = {}
    if call.statistics:
        rows = jax.tree.map(jax.lax.stop_gradient, rows)
        share, log_share = 1.0, 0.0
        if call.extra_logit is not None:
            seen = jax.lax.stop_gradient(lse)
            log_share = seen - jnp.logaddexp(seen, call.extra_logit.astype(jnp.float32))
            share = jnp.exp(log_share)
        masses = iter(range(rows["masses"].shape[2]) if "masses" in rows else ())
        for statistic in call.statistics:
            if statistic == "entropy":
                value = rows["entropy"] * share
                if call.extra_logit is not None:
                    value = value - jnp.where(share > 0, share * log_share, 0)
            elif statistic == "max_probability":
                value = rows["max_probability"] * share
            elif statistic == "key_mass":
                rest = rows["rest"] - log_share * LOG2E
                value = _key_mass(call, plan, rows["top"], rest, found)
            else:
                value = rows["masses"][:, :, next(masses)] * share
            statistics[name_of(statistic)] = value
    return AttentionOutput(out=out, lse=lse if call.return_lse else None, statistics=statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value, bias, found, extra):
    return _attend_forward(plan, query, key, value, bias, found, extra)[0]


def _attend_forward(plan, query, key, value, bias, found, extra):
    inputs = {"query": query, "key": key, "value": value} | found["visible"] | extra
    if bias is not None:
        inputs["bias"] = bias
    results = run(forward, plan, inputs | found["forward"])
    out, top, rest = results.pop("out"), results["top"], results["rest"]
    is_empty = top < EMPTY_LSE / 2
    lse = jnp.where(is_empty, EMPTY_LSE, (top * factor(plan, inputs) + rest) * LN2)
    return (out, lse, results), (query, key, value, bias, found, extra, out, top, rest)


def _attend_backward(plan, saved, cotangents):
    query, key, value, bias, found, extra, *results = saved
    dout, dlse, _ = cotangents
    gradients = pallas_gpu_bwd.backward(
        plan, (query, key, value, bias), found, extra, tuple(results), (dout, dlse)
    )
    return *gradients, None, None


_attend.defvjp(_attend_forward, _attend_backward)
_attend_jit = jax.jit(_attend, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _gradients_jit(plan, arrays, found, extra, results, cotangents):
    (out, lse), (dout, dlse) = results, cotangents
    # The kernels know a log-sum-exp as the sum of two: the maximum over `factor`, and the rest.
    rows = (out, jnp.zeros_like(lse), lse * LOG2E)
    dout = dout.astype(arrays[0].dtype)
    return pallas_gpu_bwd.backward(plan, arrays, found, extra, rows, (dout, dlse))


def forward(plan: Plan, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run the forward kernel.

    Args:
      plan: of the call.
      inputs: query, key, value and what else there is, by the names of `AXES`.

    Returns:
      `out`, `top` (the maximum of every row, over `factor`; `EMPTY_LSE` for rows that see nothing),
      `rest` (base-2 logarithm of the sum over the maximum, 0 for these) and statistics of rows.
    """
    b, t, n, _ = inputs["query"].shape
    size = plan.tiles.forward
    count_q, count_k = plan.counts(size)
    f32, dtype = jnp.float32, result_dtype(plan, inputs["query"])
    outputs = {
        "out": jax.ShapeDtypeStruct((b, t, n, plan.value_width), dtype),
        "top": jax.ShapeDtypeStruct((b, n, t), f32),
        "rest": jax.ShapeDtypeStruct((b, n, t), f32),
    }
    for name in ("entropy", "max_probability"):
        if getattr(plan, name):
            outputs[name] = jax.ShapeDtypeStruct((b, n, t), f32)
    if "indicators" in inputs:
        count = inputs["indicators"].shape[1]
        outputs["masses"] = jax.ShapeDtypeStruct((b, n, count, t), f32)

    def where(program):
        rest, i = split(program, count_q)
        example, head = split(rest, n)
        # Under a causal mask the last tile has most to do: it goes first.
        i = count_q - 1 - i
        at = {"b": example, "n": head, "k": split(head, plan.group)[0]}
        return at | {"t": i, "i": i}

    return launch(
        functools.partial(_forward_kernel, plan, where),
        inputs,
        outputs,
        grid=b * n * count_q,
        where=where,
        sizes={
            "b": 1, "n": 1, "k": 1, "i": 1, "t": size[0], "s": count_k * size[1],
            "h": padded(plan.width), "v": padded(plan.value_width),
        },
        plan=plan,
        warps=plan.tiles.forward_warps,
        name="attention_forward",
    )  # fmt: skip


def _forward_kernel(plan, where, inputs, outputs):
    size = rows, columns = plan.tiles.forward
    query_start = where(pl.program_id(0))["t"] * rows
    is_query = positions(query_start, rows, plan.t)
    all_rows = pl.ds(0, rows)
    query = load_rows(inputs["query"], (0, all_rows, 0), is_query, plan.width)

    def step(j, state, is_partial):
        start = j * columns
        tile = Tile(plan, inputs, size, (query_start, start), (0, start), (0, 0), is_partial)
        key = load_rows(inputs["key"], (0, tile.keys, 0), tile.real_keys, plan.width)
        x, _ = tile.scores(query, key)
        top = jnp.maximum(state["top"], x.max(axis=1))
        exponent = tile.exponent(x, top)
        weights = jnp.exp2(exponent)
        fall = (state["top"] - top) * tile.factor
        shrink = jnp.exp2(fall)
        new = {"top": top, "total": shrink * state["total"] + weights.sum(axis=1)}
        if plan.entropy:
            # sum_s w log2 w, whose reference point moves with the maximum.
            step_sum = jnp.where(weights > 0, weights * exponent, 0).sum(axis=1)
            new["bent"] = shrink * (state["bent"] + state["total"] * fall) + step_sum
        if "indicators" in inputs:
            ref = inputs["indicators"]
            new["masses"] = []
            for z, mass in enumerate(state["masses"]):
                indicator = load_vector(ref, (0, z, tile.keys), tile.real_keys)
                new["masses"].append(shrink * mass + (weights * indicator[None, :]).sum(axis=1))
        if plan.dropout_rate:
            weights = weights * tile.dropout()
        value = load_rows(inputs["value"], (0, tile.keys, 0), tile.real_keys, plan.value_width)
        step_sum = product(weights.astype(value.dtype), value, 1, 0)
        new["sum"] = shrink[:, None] * state["sum"] + step_sum
        return new

    zeros = jnp.zeros((rows,), jnp.float32)
    # The first maximum is finite, so that rows of nothing but -inf do not become NaN.
    state = {"top": zeros + EMPTY_LSE, "total": zeros}
    state["sum"] = jnp.zeros((rows, padded(plan.value_width)), jnp.float32)
    if plan.entropy:
        state["bent"] = zeros
    if "indicators" in inputs:
        state["masses"] = [zeros] * inputs["indicators"].shape[1]
    ragged = plan.s % columns > 0
    state = visit(step, state, inputs, (0, 0), plan.counts(size)[1], ragged)

    is_empty = state["total"] == 0
    total = jnp.where(is_empty, 1.0, state["total"])
    out = state["sum"] / total[:, None]
    store_rows(outputs["out"], (0, all_rows, 0), out, is_query, plan.value_width)
    store_vector(outputs["top"], (0, 0, all_rows), state["top"], is_query)
    store_vector(outputs["rest"], (0, 0, all_rows), jnp.log2(total), is_query)
    if plan.entropy:
        entropy = (jnp.log2(total) - state["bent"] / total) * LN2
        store_vector(outputs["entropy"], (0, 0, all_rows), entropy, is_query)
    if plan.max_probability:
        largest = jnp.where(is_empty, 0.0, 1 / total)
        store_vector(outputs["max_probability"], (0, 0, all_rows), largest, is_query)
    for z, mass in enumerate(state.get("masses", ())):
        store_vector(outputs["masses"], (0, 0, z, all_rows), mass / total, is_query)


def _key_mass(call, plan, top, rest, found):
    """Return the mass `[b,n,s]` that keys receive, given maxima and sums of rows `[b,n,t]`."""
    query, key, _, bias = jax.tree.map(jax.lax.stop_gradient, _arrays(call))
    inputs = {"query": query, "key": key, "top": top, "rest": rest} | found["visible"]
    if bias is not None:
        inputs["bias"] = bias
    return _key_mass_jit(plan, inputs | found["key_major"])


@functools.partial(jax.jit, static_argnums=0)
def _key_mass_jit(plan, inputs):
    return run(_key_mass_launch, plan, inputs)["key_mass"]


def _key_mass_launch(plan, inputs):
    b, _, n, _ = inputs["query"].shape
    size = plan.tiles.backward
    count_q, count_k = plan.counts(size)

    def where(program):
        rest, j = split(program, count_k)
        example, head = split(rest, n)
        at = {"b": example, "n": head, "k": split(head, plan.group)[0]}
        return at | {"s": j, "i": j}

    return launch(
        functools.partial(_key_mass_kernel, plan, where),
        inputs,
        {"key_mass": jax.ShapeDtypeStruct((b, n, plan.s), jnp.float32)},
        grid=b * n * count_k,
        where=where,
        sizes={
            "b": 1, "n": 1, "k": 1, "i": 1, "s": size[1], "t": count_q * size[0],
            "h": padded(plan.width),
        },
        plan=plan,
        warps=plan.tiles.backward_warps,
        name="attention_key_mass",
    )  # fmt: skip


def _key_mass_kernel(plan, where, inputs, outputs):
    size = rows, columns = plan.tiles.backward
    key_start = where(pl.program_id(0))["s"] * columns
    is_key = positions(key_start, columns, plan.s)
    all_keys = pl.ds(0, columns)
    key = load_rows(inputs["key"], (0, all_keys, 0), is_key, plan.width)

    def step(i, mass, is_partial):
        start = i * rows
        tile = Tile(
            plan, inputs, size, (start, key_start), (start, 0), (0, 0), is_partial, key_major=True
        )
        is_query = tile.real_queries
        query = load_rows(inputs["query"], (0, tile.queries, 0), is_query, plan.width)
        x, _ = tile.scores(query, key)
        return mass + jnp.exp2(tile.exponent(x, *tile.normalised())).sum(axis=1)

    mass = jnp.zeros((columns,), jnp.float32)
    mass = visit(step, mass, inputs, (0, 0), plan.counts(size)[0], False)
    store_vector(outputs["key_mass"], (0, 0, all_keys), mass, is_key)
