# SPDX-License-Identifier: Apache-2.0
"""Flash attention for GPUs, in Pallas by way of Triton: backward.

With p = 2^(factor (x - m) - log2 l), dp = dout . value and delta = sum_h(dout out) - dlse:

    dvalue = sum_t p dout      ds = p (dp - delta)      dkey, dquery = scale * ds . query, key

Two kernels and a third only where a bias needs it, none with atomic operations, so that results do
not depend on the order of programs: one program owns a tile of keys of one key/value head and walks
the tiles of queries of all its query heads; one owns a tile of queries and walks tiles of keys; one
owns a tile of the bias and walks the examples and heads that share it.

What ran on a GPU, see `pallas_gpu`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from attnjax.ops.mask import EMPTY
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.pallas_gpu_tile import (
    Plan,
    Tile,
    launch,
    load_rows,
    load_vector,
    padded,
    pick,
    positions,
    product,
    result_dtype,
    run,
    split,
    store_rows,
    store_tile,
    store_vector,
    visit,
)


def backward(
    plan: Plan, arrays: tuple, found: dict, extra: dict, results: tuple, cotangents: tuple
):
    """Differentiate the forward kernel.

    Args:
      plan: of the call.
      arrays: query, key, value, and bias or None.
      found: from `tables`.
      extra: seed and heads, if there is dropout.
      results: out, top and rest of the forward kernel.
      cotangents: of out and of the log-sum-exp.

    Returns:
      Gradients of the arrays.
    """
    query, key, value, bias = arrays
    (out, top, rest), (dout, dlse) = results, cotangents
    f32 = jnp.float32
    delta = jnp.einsum("btnh,btnh->bnt", dout.astype(f32), out.astype(f32)) - dlse
    inputs = {"query": query, "key": key, "value": value, "dout": dout, "delta": delta}
    inputs |= {"top": top, "rest": rest} | found["visible"]
    inputs |= {name: extra[name] for name in ("seed", "heads") if name in extra}
    if bias is not None:
        inputs["bias"] = bias
    of_keys = run(_key_gradients, plan, inputs | found["key_major"])
    dquery = run(_query_gradient, plan, inputs | found["query_major"])["dquery"]
    dbias = None
    if bias is not None:
        if bias.shape[3] == 1:
            # ds sums to dlse over a row: what is added to a whole row changes nothing else.
            dbias = _sum_to(jnp.where(top > EMPTY_LSE / 2, dlse, 0)[..., None], bias)
        elif bias.shape[2] == 1:
            dbias = _sum_to(of_keys["dbias_keys"][:, :, None], bias)
        else:
            results = run(_bias_gradient, plan, inputs | found["kinds"])
            dbias = results["dbias"].astype(bias.dtype)
    return dquery, of_keys["dkey"], of_keys["dvalue"], dbias


def _sum_to(array, like):
    axes = tuple(axis for axis in range(4) if like.shape[axis] < array.shape[axis])
    return array.sum(axis=axes, keepdims=True).astype(like.dtype)


def _slope(ds, slope):
    return ds if slope is None else ds * slope


def _key_gradients(plan, inputs):
    b, _, n, _ = inputs["query"].shape
    k, group = n // plan.group, plan.group
    size = plan.tiles.backward
    count_q, count_k = plan.counts(size)
    outputs = {
        "dkey": jax.ShapeDtypeStruct(inputs["key"].shape, result_dtype(plan, inputs["key"])),
        "dvalue": jax.ShapeDtypeStruct(inputs["value"].shape, result_dtype(plan, inputs["value"])),
    }
    if _needs_key_bias(inputs):
        outputs["dbias_keys"] = jax.ShapeDtypeStruct((b, n, plan.s), jnp.float32)

    def where(program):
        rest, j = split(program, count_k)
        example, head = split(rest, k)
        return {"b": example, "n": head, "k": head, "s": j, "i": j}

    return launch(
        functools.partial(_key_kernel, plan, where),
        inputs,
        outputs,
        grid=b * k * count_k,
        where=where,
        sizes={
            "b": 1, "n": group, "k": 1, "i": 1, "s": size[1], "t": count_q * size[0],
            "h": padded(plan.width), "v": padded(plan.value_width),
        },
        plan=plan,
        warps=plan.tiles.backward_warps,
        name="attention_backward_keys",
    )  # fmt: skip


def _needs_key_bias(inputs):
    return "bias" in inputs and inputs["bias"].shape[2] == 1 and inputs["bias"].shape[3] > 1


def _key_kernel(plan, where, inputs, outputs):
    size = rows, columns = plan.tiles.backward
    key_start = where(pl.program_id(0))["s"] * columns
    is_key = positions(key_start, columns, plan.s)
    all_keys = pl.ds(0, columns)
    key = load_rows(inputs["key"], (0, all_keys, 0), is_key, plan.width)
    value = load_rows(inputs["value"], (0, all_keys, 0), is_key, plan.value_width)
    needs_bias = "dbias_keys" in outputs

    def of_head(g, state):
        def step(i, state, is_partial):
            start = i * rows
            tile = Tile(
                plan, inputs, size, (start, key_start), (start, 0), (0, g), is_partial,
                key_major=True,
            )  # fmt: skip
            query, dout, normalised, delta = _query_side(plan, inputs, tile)
            x, slope = tile.scores(query, key)
            p = jnp.exp2(tile.exponent(x, *normalised))
            dp = product(value, dout)
            kept = p
            if plan.dropout_rate:
                dropped = tile.dropout()
                kept, dp = p * dropped, dp * dropped
            ds = p * (dp - delta[None, :])
            dkey, dvalue, dbias = state
            dvalue = dvalue + product(kept.astype(dout.dtype), dout, 1, 0)
            dkey = dkey + product(_slope(ds, slope).astype(query.dtype), query, 1, 0)
            return dkey, dvalue, dbias + ds.sum(axis=1) if needs_bias else None

        dkey, dvalue = state
        dbias = jnp.zeros((columns,), jnp.float32) if needs_bias else None
        state = (dkey, dvalue, dbias)
        dkey, dvalue, dbias = visit(step, state, inputs, (0, g), plan.counts(size)[0], False)
        if needs_bias:
            store_vector(outputs["dbias_keys"], (0, g, all_keys), dbias, is_key)
        return dkey, dvalue

    state = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    dkey, dvalue = jax.lax.fori_loop(np.int32(0), np.int32(plan.group), of_head, state)
    store_rows(outputs["dkey"], (0, all_keys, 0), dkey * plan.scale, is_key, plan.width)
    store_rows(outputs["dvalue"], (0, all_keys, 0), dvalue, is_key, plan.value_width)


def _query_side(plan, inputs, tile):
    """Load what a tile needs of its queries."""
    is_query = tile.real_queries
    example, head = tile.heads
    at = (example, tile.queries, head)
    query = load_rows(inputs["query"], at, is_query, plan.width)
    dout = load_rows(inputs["dout"], at, is_query, plan.value_width)
    delta = load_vector(inputs["delta"], (example, head, tile.queries), is_query)
    return query, dout, tile.normalised(), delta


def _query_gradient(plan, inputs):
    b, _, n, _ = inputs["query"].shape
    dtype = result_dtype(plan, inputs["query"])
    size = plan.tiles.backward
    count_q, count_k = plan.counts(size)

    def where(program):
        rest, i = split(program, count_q)
        example, head = split(rest, n)
        i = count_q - 1 - i  # As in the forward kernel.
        at = {"b": example, "n": head, "k": split(head, plan.group)[0]}
        return at | {"t": i, "i": i}

    return launch(
        functools.partial(_query_kernel, plan, where),
        inputs,
        {"dquery": jax.ShapeDtypeStruct(inputs["query"].shape, dtype)},
        grid=b * n * count_q,
        where=where,
        sizes={
            "b": 1, "n": 1, "k": 1, "i": 1, "t": size[0], "s": count_k * size[1],
            "h": padded(plan.width), "v": padded(plan.value_width),
        },
        plan=plan,
        warps=plan.tiles.backward_warps,
        name="attention_backward_queries",
    )  # fmt: skip


def _query_kernel(plan, where, inputs, outputs):
    size = rows, columns = plan.tiles.backward
    query_start = where(pl.program_id(0))["t"] * rows
    at_start = Tile(plan, inputs, size, (query_start, 0), (0, 0), (0, 0), False)
    query_side = _query_side(plan, inputs, at_start)

    def step(j, dquery, is_partial):
        start = j * columns
        tile = Tile(plan, inputs, size, (query_start, start), (0, start), (0, 0), is_partial)
        key = load_rows(inputs["key"], (0, tile.keys, 0), tile.real_keys, plan.width)
        value = load_rows(inputs["value"], (0, tile.keys, 0), tile.real_keys, plan.value_width)
        ds, slope = _score_gradient(plan, tile, query_side, key, value)
        return dquery + product(_slope(ds, slope).astype(key.dtype), key, 1, 0)

    dquery = jnp.zeros(query_side[0].shape, jnp.float32)
    ragged = plan.s % columns > 0
    dquery = visit(step, dquery, inputs, (0, 0), plan.counts(size)[1], ragged)
    dquery = dquery * plan.scale
    at = (0, pl.ds(0, rows), 0)
    store_rows(outputs["dquery"], at, dquery, at_start.real_queries, plan.width)


def _score_gradient(plan, tile, query_side, key, value):
    """Return ds `[queries, keys]` and the slope of the cap."""
    query, dout, normalised, delta = query_side
    x, slope = tile.scores(query, key)
    p = jnp.exp2(tile.exponent(x, *normalised))
    dp = product(dout, value)
    if plan.dropout_rate:
        dp = dp * tile.dropout()
    return p * (dp - delta[:, None]), slope


def _bias_gradient(plan, inputs):
    b, _, n, _ = inputs["query"].shape
    bias_b, bias_n, _, _ = inputs["bias"].shape
    k = n // plan.group
    size = plan.tiles.backward
    count_q, count_k = plan.counts(size)
    # Where the bias is shared, a program has all examples or all heads.
    shares = (b if bias_b == 1 else 1, n if bias_n == 1 else 1)

    def where(program):
        rest, j = split(program, count_k)
        rest, i = split(rest, count_q)
        example, head = split(rest, bias_n)
        at = {"b": example, "n": head, "t": i, "s": j, "i": i, "j": j}
        return at | {"k": split(head, plan.group)[0]}

    return launch(
        functools.partial(_bias_kernel, plan, where, shares),
        inputs,
        {"dbias": jax.ShapeDtypeStruct((bias_b, bias_n, plan.t, plan.s), jnp.float32)},
        grid=bias_b * bias_n * count_q * count_k,
        where=where,
        sizes={
            "b": shares[0], "n": shares[1], "k": k if shares[1] > 1 else 1, "i": 1, "j": 1,
            "t": size[0], "s": size[1], "h": padded(plan.width), "v": padded(plan.value_width),
        },
        plan=plan,
        warps=plan.tiles.backward_warps,
        name="attention_backward_bias",
    )  # fmt: skip


def _bias_kernel(plan, where, shares, inputs, outputs):
    size = rows, columns = plan.tiles.backward
    at = where(pl.program_id(0))
    starts = (at["t"] * rows, at["s"] * columns)

    def of_head(index, total):
        example, head = split(index, shares[1])
        tile = Tile(plan, inputs, size, starts, (0, 0), (example, head), True)

        def compute():
            at_keys = (example, tile.keys, split(head, plan.group)[0])
            key = load_rows(inputs["key"], at_keys, tile.real_keys, plan.width)
            value = load_rows(inputs["value"], at_keys, tile.real_keys, plan.value_width)
            query_side = _query_side(plan, inputs, tile)
            return _score_gradient(plan, tile, query_side, key, value)[0]

        if "kinds" not in inputs:
            return total + compute()
        kinds = inputs["kinds"]
        kind = kinds[*pick(kinds, example, head), 0, 0]
        return total + jax.lax.cond(kind == EMPTY, lambda: jnp.zeros_like(total), compute)

    total = jnp.zeros(size, jnp.float32)
    count = np.int32(shares[0] * shares[1])
    total = jax.lax.fori_loop(np.int32(0), count, of_head, total)
    tile = Tile(plan, inputs, size, starts, (0, 0), (0, 0), True)
    is_real = (tile.real_queries, tile.real_keys)
    store_tile(outputs["dbias"], (0, 0), total, is_real)
