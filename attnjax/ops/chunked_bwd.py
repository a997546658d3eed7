# SPDX-License-Identifier: Apache-2.0
"""Backward pass of `chunked`: every tile is recomputed from the rows' maxima m and sums l.

    p = exp(scores - m - log l)    dscores = p * (dout . value - sum_h(dout out) + dlse)
    dquery = dscores . key         dkey = dscores^T . query         dvalue = p^T . dout

m and log l are kept apart: where scores are in the thousands, their sum has no digits left for l.

With an `Elementwise` normalizer of weights w, terms e and denominator d,

    dw = dout/d . value      de = -sum_h(dout out) / d * d'      dscores = w' * dw + e' * de

and where both depend on the log-sum-exp, a pass of its own finds the derivative by that first.

The sums over queries are accumulated transposed, `[h, s]`: as products of a small transposed
operand with the tile itself they run at the speed of the others, whereas transposing the tile
costs four times as much on CPU.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnjax.ops.bias import Bias
from attnjax.ops.chunked_tiles import Plan, einsum, loop, with_scanned_gradient
from attnjax.typing import Array


@with_scanned_gradient
def backward(plan: Plan, operands, out, sums, cotangents) -> tuple:
    """Return the cotangents of query, key, value, bias and row parameter (None without them).

    Args:
      plan: of the forward pass.
      operands: its query, key, value, bias, row parameter, mask and dropout seed.
      out: its output.
      sums: its sums of every row.
      cotangents: of the output `[b,t,n,hv]` and of the log-sum-exp `[b,n,t]`.
    """
    query, key, value, bias, row, mask, seed = operands
    dout, dlse = cotangents
    wide = jnp.promote_types(query.dtype, jnp.float32)
    dtype = wide if plan.is_partial else query.dtype
    if plan.rule:
        # Where weights saturate, cotangents of scores cancel: they need all of their digits.
        query, key, value = (x.astype(wide) for x in (query, key, value))
    key_all, value_all = plan.split_key(key), plan.split_key(value)
    is_object = isinstance(bias, Bias)
    bias_all = bias if bias is None or is_object else plan.split_scores(bias)
    dout, rows = _by_row(plan, dout.astype(wide), dlse, out.astype(wide), sums)
    by_query = jax.tree.map(plan.split_query, (query, dout.astype(query.dtype), row, rows))

    def group_step(dbias, inputs):
        u, by_query_u, key_u, value_u = inputs

        def query_step(state, inputs):
            j, (query_bkgth, dout_bkgth, row_tile, rows_tile) = inputs
            # Rows of all heads of a group add up in one product.
            query_t, dout_t = (_transpose(x) for x in (query_bkgth, dout_bkgth))

            def products(m, is_partial):
                operands = query_bkgth, plan.take_keys(key_u, m), bias_all
                scores, slope = plan.scores(*operands, mask if is_partial else None, (u, j, m))
                dweights = einsum("bkgth,bksh->bkgts", dout_bkgth, plan.take_keys(value_u, m))
                factor = None
                if plan.dropout_rate:
                    factor = plan.dropout(seed, (u, j, m)).astype(wide)
                    dweights = dweights * factor
                return scores, slope, dweights, factor

            def lse_step(dlog_total, m, is_partial):
                scores, _, dweights, _ = products(m, is_partial)
                return dlog_total + _pull(plan, scores, dweights, row_tile, rows_tile)[2]

            if rows_tile.dlog_total is not None:
                dlog_total = plan.visit(mask, u, j, lse_step, rows_tile.dlog_total)
                rows_tile = rows_tile._replace(dlog_total=dlog_total)

            def key_step(state, m, is_partial):
                dquery, drow, dkey_t, dvalue_t, dbias = state
                scores, slope, dweights, factor = products(m, is_partial)
                weights, dscores, _, step = _pull(plan, scores, dweights, row_tile, rows_tile)
                drow = None if drow is None else drow + step
                kept = weights if factor is None else weights * factor
                if is_object:
                    dbias = _add_object(plan, bias, dbias, dscores, (u, j, m))
                elif dbias is not None:
                    dbias = plan.add_scores(dbias, dscores, (u, j, m))
                dproduct = (dscores * slope).astype(query.dtype)
                dquery = dquery + einsum("bkgts,bksh->bkgth", dproduct, plan.take_keys(key_u, m))
                dkey_t = _add_keys(dkey_t, _by_rows(query_t, dproduct), m)
                dvalue_t = _add_keys(dvalue_t, _by_rows(dout_t, kept.astype(query.dtype)), m)
                return dquery, drow, dkey_t, dvalue_t, dbias

            zeros = lambda x: None if x is None else plan.full(x.shape, 0, wide)
            start = (zeros(query_bkgth), zeros(row_tile), *state)
            dquery, drow, *state = plan.visit(mask, u, j, key_step, start)
            return tuple(state), (dquery.astype(dtype), drow)

        transposed = lambda x: plan.full((*x.shape[:2], x.shape[3], x.shape[2]), 0, wide)
        start = (transposed(key_u), transposed(value_u), dbias)
        (dkey_t, dvalue_t, dbias), by_query_u = loop(
            query_step, start, (jnp.arange(plan.counts[1]), by_query_u)
        )
        dkey, dvalue = (x.swapaxes(2, 3).astype(dtype) for x in (dkey_t, dvalue_t))
        return dbias, (by_query_u, dkey, dvalue)

    start = jax.tree.map(lambda x: plan.full(x.shape, 0, wide), bias_all)
    inputs = (jnp.arange(plan.counts[0]), by_query, key_all, value_all)
    dbias, (by_query, dkey, dvalue) = loop(group_step, start, inputs)
    if is_object:
        dbias = jax.tree.map(lambda x, like: x.astype(like.dtype), dbias, bias)
    elif bias is not None:
        dbias = plan.join_scores(dbias, bias.shape).astype(bias.dtype)
    dquery, drow = jax.tree.map(plan.join_query, by_query)
    dkey, dvalue = plan.join_key(dkey), plan.join_key(dvalue)
    return *(x.astype(dtype) for x in (dquery, dkey, dvalue)), dbias, drow


class _Rows(NamedTuple):
    """What a row contributes to its cotangents, `[b,t,n,1]` or None.

    Attributes:
      dterm: for softmax what is subtracted from dweights, else the cotangent of every term.
      dlog_total: part of the cotangent of the log-sum-exp, where weights depend on it.
      top, log_total: from the forward pass.
    """

    dterm: Any
    dlog_total: Any
    top: Any
    log_total: Any


def _by_row(plan, dout, dlse, out, sums) -> tuple[Array, _Rows]:
    """Return the cotangent of the sum of weighted values, and the rest of every row."""
    top, log_total, total = sums
    dot = (dout * out).sum(axis=-1, keepdims=True)
    if not plan.rule:
        # sum_s(p * dweights) equals dout . out, which is cheap.
        return dout, _Rows(dot - dlse.swapaxes(1, 2)[..., None], None, top, log_total)
    dterm = None
    dlog_total = None if log_total is None else jnp.zeros_like(log_total)
    if plan.has_denominator:
        divide = lambda total, log_total: plan.denominator(total, top, log_total)
        divisor, back = jax.vjp(divide, total, log_total)
        dterm, dlog_total = back(-dot / divisor)
        dout = dout / divisor
    return dout, _Rows(dterm, dlog_total, top, log_total)


def _pull(plan, scores, dweights, row, rows: _Rows) -> tuple:
    """Return weights and the cotangents of scores, of the log-sum-exp and of the row parameter."""
    if not plan.rule:
        weights = jnp.exp(scores - rows.top - rows.log_total)
        return weights, weights * (dweights - rows.dterm), None, None

    def weigh(scores, log_total, row):
        return plan.weigh(scores, rows.top, log_total, row)

    (weights, terms), back = jax.vjp(weigh, scores, rows.log_total, row)
    dterms = None if terms is None else jnp.broadcast_to(rows.dterm, terms.shape)
    dscores, dlog_total, drow = back((dweights, dterms))
    if rows.dlog_total is not None:
        dscores = dscores + rows.dlog_total * jnp.exp(scores - rows.top - rows.log_total)
    # Weights may have a slope where nothing can be seen.
    dscores = jnp.where(scores > -jnp.inf, dscores, 0)
    return weights, dscores, dlog_total, drow


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


def _add_object(plan: Plan, bias: Bias, total, step_bkgts: Array, tile):
    """Add the gradient of a `Bias`'s own parameters."""
    value, pull = jax.vjp(lambda leaf: plan.bias_tile(leaf, tile), bias)
    reduced = tuple(axis for axis, size in enumerate(value.shape) if size < step_bkgts.shape[axis])
    step = step_bkgts.sum(axis=reduced, keepdims=True).astype(value.dtype)
    (gradient,) = pull(step)
    return jax.tree.map(lambda sum_, x: sum_ + x.astype(sum_.dtype), total, gradient)
