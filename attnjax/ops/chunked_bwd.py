# SPDX-License-Identifier: Apache-2.0
"""Backward pass of `chunked`: every tile is recomputed from the rows' maxima m and sums l.

    p = exp(scores - m - log l)    dscores = p * (dout . value - sum_h(dout out) + dlse)
    dquery = dscores . key         dkey = dscores^T . query         dvalue = p^T . dout

m and log l are kept apart: where scores are in the thousands, their sum has no digits left for l.

The sums over queries are accumulated transposed, `[h, s]`: as products of a small transposed
operand with the tile itself they run at the speed of the others, whereas transposing the tile
costs four times as much on CPU.
"""

import jax
import jax.numpy as jnp

from attnjax.ops.bias import Bias
from attnjax.ops.chunked import (
    Plan,
    einsum,
    loop,
    score_starts,
    take_keys,
    with_scanned_gradient,
)
from attnjax.typing import Array


@with_scanned_gradient
def backward(plan: Plan, operands, results, cotangents) -> tuple:
    """Return the cotangents of query, key, value and bias (None without one).

    Args:
      plan: of the forward pass.
      operands: its query, key, value, bias, mask and dropout seed.
      results: its output, row maxima m and log l.
      cotangents: of the output `[b,t,n,hv]` and of the log-sum-exp `[b,n,t]`.
    """
    query, key, value, bias, mask, seed = operands
    out, top, log_total = results
    dout, dlse = cotangents
    wide = jnp.promote_types(query.dtype, jnp.float32)
    i_count, j_count, _ = plan.counts
    key_all, value_all = plan.split_key(key), plan.split_key(value)
    is_object = isinstance(bias, Bias)
    bias_all = bias if bias is None or is_object else plan.split_scores(bias)
    # dscores = p * (dweights - shift): sum_s(p * dweights) equals dout . out, which is cheap.
    shift_btn = (dout.astype(wide) * out.astype(wide)).sum(axis=-1) - dlse.swapaxes(1, 2)
    by_query = (query, dout, shift_btn[..., None], top, log_total)
    by_query = tuple(plan.split_query(array) for array in by_query)

    def example_step(dbias, index_and_rows):
        i, by_query_b, key_b, value_b = index_and_rows

        def query_step(state, index_and_query):
            j, (query_bkgth, dout_bkgth, shift, top_tile, log_total_tile) = index_and_query
            # Rows of all heads of a group add up in one product.
            query_t, dout_t = (_transpose(x) for x in (query_bkgth, dout_bkgth))

            def key_step(state, m, is_partial):
                dquery, dkey_t, dvalue_t, dbias = state
                tile = (i, j, m)
                key_tile, value_tile = take_keys(key_b, m, plan), take_keys(value_b, m, plan)
                scores, slope = plan.scores(
                    query_bkgth, key_tile, bias_all, mask if is_partial else None, tile
                )
                weights = jnp.exp(scores - top_tile - log_total_tile)
                dweights = einsum("bkgth,bksh->bkgts", dout_bkgth, value_tile)
                kept = weights
                if plan.dropout_rate:
                    factor = plan.dropout(seed, tile).astype(wide)
                    kept, dweights = kept * factor, dweights * factor
                dscores = weights * (dweights - shift)
                if is_object:
                    dbias = _add_object(plan, bias, dbias, dscores, tile)
                elif dbias is not None:
                    dbias = _add_scores(dbias, dscores, tile)
                dproduct = (dscores * slope).astype(query.dtype)
                dquery = dquery + einsum("bkgts,bksh->bkgth", dproduct, key_tile)
                dkey_t = _add_keys(dkey_t, _by_rows(query_t, dproduct), m)
                dvalue_t = _add_keys(dvalue_t, _by_rows(dout_t, kept.astype(query.dtype)), m)
                return dquery, dkey_t, dvalue_t, dbias

            start = (jnp.zeros(query_bkgth.shape, wide), *state)
            dquery, *state = plan.visit(mask, i, j, key_step, start)
            return tuple(state), dquery.astype(query.dtype)

        bt, k, size, _ = key_b.shape
        start = (
            jnp.zeros((bt, k, key.shape[-1], size), wide),
            jnp.zeros((bt, k, value.shape[-1], size), wide),
            dbias,
        )
        (dkey_t, dvalue_t, dbias), dquery = loop(
            query_step, start, (jnp.arange(j_count), by_query_b)
        )
        dkey, dvalue = (x.swapaxes(2, 3).astype(key.dtype) for x in (dkey_t, dvalue_t))
        return dbias, (dquery, dkey, dvalue)

    start = None
    if is_object:
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), bias)
    elif bias is not None:
        start = jnp.zeros(bias_all.shape, wide)
    rows = (jnp.arange(i_count), by_query, key_all, value_all)
    dbias, (dquery, dkey, dvalue) = loop(example_step, start, rows)
    if is_object:
        dbias = jax.tree.map(lambda x, like: x.astype(like.dtype), dbias, bias)
    elif bias is not None:
        dbias = plan.join_scores(dbias, bias.shape).astype(bias.dtype)
    return plan.join_query(dquery), plan.join_key(dkey), plan.join_key(dvalue), dbias


def _transpose(array_bkgth: Array) -> Array:
    """Return `[bt,k,h,g*tq]`, really moved: XLA for CPU lacks bfloat16 products of moved views."""
    bt, k, g, tq, h = array_bkgth.shape
    moved = array_bkgth.reshape(bt, k, g * tq, h).swapaxes(2, 3)
    return jax.lax.optimization_barrier(moved)


def _by_rows(left_bkhr: Array, tile_bkgts: Array) -> Array:
    """Sum over the rows of all heads of a group: `[bt,k,h,ts]`."""
    bt, k, g, tq, ts = tile_bkgts.shape
    return einsum("bkhr,bkrs->bkhs", left_bkhr, tile_bkgts.reshape(bt, k, g * tq, ts))


def _add_keys(total_bkhs: Array, step_bkhs: Array, m) -> Array:
    size = step_bkhs.shape[3]
    if total_bkhs.shape[3] == size:
        return total_bkhs + step_bkhs
    part = jax.lax.dynamic_slice_in_dim(total_bkhs, m * size, size, axis=3)
    return jax.lax.dynamic_update_slice_in_dim(total_bkhs, part + step_bkhs, m * size, axis=3)


def _add_scores(total: Array, step_bkgts: Array, tile) -> Array:
    bt, _, k, g, _, tq, _, ts = total.shape
    whole = step_bkgts.shape
    reduced = tuple(axis for axis, size in enumerate((bt, k, g, tq, ts)) if size < whole[axis])
    step = step_bkgts.sum(axis=reduced).reshape(bt, 1, k, g, 1, tq, 1, ts)
    starts = score_starts(total.shape, tile)
    part = jax.lax.dynamic_slice(total, starts, step.shape)
    return jax.lax.dynamic_update_slice(total, part + step, starts)


def _add_object(plan: Plan, bias: Bias, total, step_bkgts: Array, tile):
    """Add the gradient of a `Bias`'s own parameters."""
    value, pull = jax.vjp(lambda leaf: plan.bias_tile(leaf, tile), bias)
    reduced = tuple(axis for axis, size in enumerate(value.shape) if size < step_bkgts.shape[axis])
    step = step_bkgts.sum(axis=reduced, keepdims=True).astype(value.dtype)
    (gradient,) = pull(step)
    return jax.tree.map(lambda sum_, x: sum_ + x.astype(sum_.dtype), total, gradient)
