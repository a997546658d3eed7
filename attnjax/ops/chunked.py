# SPDX-License-Identifier: Apache-2.0
"""Online-softmax attention in plain XLA: the scores exist one tile at a time.

Forward, over the tiles of keys of one tile of queries, with running maximum m and sum l:

    m' = max(m, max_s scores)      p = exp(scores - m')      l' = exp(m - m') l + sum_s p
    acc' = exp(m - m') acc + p . value                       out = acc / l, lse = m + log l

An `Elementwise` normalizer puts its `weight` and `term` in the place of the two p; one that needs
the log-sum-exp first has a pass of its own for it.

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
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.ops.attention import AttentionOutput, Call
from attnjax.ops.bias import Bias
from attnjax.ops.chunked_statistics import (
    Collector,
    collected_names,
    collected_operands,
    name_statistics,
    needs_tiles,
)
from attnjax.ops.chunked_tiles import Plan, Tiles, einsum, loop, with_scanned_gradient
from attnjax.ops.dropout import dropout_seed
from attnjax.ops.mask import Visibility
from attnjax.ops.normalizer import EMPTY_LSE, Elementwise
from attnjax.ops.partition import vary_alike

# Scores in a tile on CPU, measured on two cores with 1 MiB of L2 cache each and 32 MiB of L3: above
# the first they fall out of the cache; below the second the loop over examples costs more than it
# saves.
LARGE_TILE = 2**20
SMALL_TILE = 2**19


def attend(call: Call, tiles: Tiles | None = None) -> AttentionOutput:
    """Serve a call tile by tile.

    Args:
      call: the checked arguments.
      tiles: tile sizes, for tests and tuning; the examples must divide the batch, the heads the
        number of key/value heads. Chosen from the shapes if None.

    Returns:
      An `AttentionOutput` without probabilities and scores.

    Raises:
      NotImplementedError: the call asks for something that needs whole rows at once.
    """
    plan, operands = _prepare(call, tiles)
    out, lse, sums, collected = _attend_jit(plan, *operands)
    statistics = {}
    if call.statistics:
        statistics = name_statistics(call, plan, *jax.lax.stop_gradient((lse, sums, collected)))
    return AttentionOutput(out=out, lse=lse if call.return_lse else None, statistics=statistics)


def gradients(call: Call, results: tuple, cotangents: tuple, tiles: Tiles | None = None) -> tuple:
    """Return a part's contribution to gradients, see `attention.serve_gradients`."""
    call = dataclasses.replace(call, statistics=())
    call.refuse("chunked: gradients of a part", "normalizer")
    plan, operands = _prepare(call, tiles)
    out, lse = results
    # Of the larger call only the log-sum-exp is known, not the two that it is the sum of.
    top = lse.swapaxes(1, 2)[..., None]
    sums = (top, jnp.zeros_like(top), None)
    _, arrays = vary_alike((operands[:-1], out, sums, cotangents))
    return _gradients_jit(plan, *arrays)[:4]


def _prepare(call: Call, tiles: Tiles | None) -> tuple[Plan, tuple]:
    """Return the plan of a call and the operands of its passes."""
    call.refuse("chunked", "return_probabilities", "return_scores", "edit")
    (b, n, t, s), key_heads = call.scores_shape, call.key.shape[2]
    if b == 0:
        raise NotImplementedError("chunked: an empty batch is not served")
    rule, row_btn1 = (), None
    if call.normalizer is not None:
        rule, row_btn1 = (jax.tree.structure(call.normalizer),), _row_parameter(call)
    collects = collected_names(call)
    if tiles is None:
        stores = needs_tiles(collects, bool(rule))
        # Everything visible: few large tiles cost nothing. But bfloat16 is slow in them.
        is_wide = call.visibility.is_full and call.query.dtype != jnp.bfloat16
        found = None if stores else call.tuning.find("chunked", call)
        tiles = choose_tiles((b, n, t, s), key_heads, is_wide=is_wide, stores=stores, found=found)
    plan = Plan(
        tiles=tiles,
        scores_shape=(b, n, t, s),
        key_heads=key_heads,
        scale=call.scale,
        softcap=call.softcap,
        dropout_rate=call.dropout_rate,
        rule=rule,
        collects=collects,
        is_partial=call.is_partial,
    )
    seed = (dropout_seed(call.dropout_key), call.place) if call.dropout_rate else None
    mask = plan.prepare_mask(call.visibility)
    operands = (call.query, call.key, call.value, call.bias, row_btn1, mask, seed)
    varying, operands = vary_alike((*operands, collected_operands(call)))
    return dataclasses.replace(plan, varying=varying), operands


def choose_tiles(
    scores_shape: tuple[int, int, int, int],
    key_heads: int,
    *,
    is_wide: bool = False,
    stores: bool = False,
    found: Mapping[str, int] | None = None,
) -> Tiles:
    """Choose tile sizes.

    Args:
      scores_shape: `(b, n, t, s)`.
      key_heads: k.
      is_wide: whether to prefer long stretches of keys.
      stores: whether the tiles of a row are kept until its end.
      found: limits of queries and keys, and number of heads, that were measured to be best.

    Returns:
      On CPU tiles that stay in the cache, so few heads share one, and few examples, or one per
      device of the ambient mesh. An accelerator wants wide steps: all at once.
    """
    b, n, t, s = scores_shape
    is_cpu, devices = jax.default_backend() == "cpu", _ambient_devices()
    if found is not None:
        queries, keys = _even(t, found["queries"]), _even(s, found["keys"])
        heads = found["heads"] if is_cpu and devices == 1 else key_heads
    elif is_cpu:
        queries, keys, heads = _tiles_in_cache(scores_shape, key_heads, devices, is_wide, stores)
    else:
        queries, keys, heads = _even(t, 256), s if s <= 1024 else _even(s, 512), key_heads
    if not is_cpu:
        return Tiles(b, queries, keys, heads)
    rows = n // key_heads * heads * keys
    # The ways the batch is cut divide both, whatever the other axes of the mesh are for.
    shards = math.gcd(b, devices)
    examples = shards
    while b % examples or (examples // shards * rows * queries < SMALL_TILE and examples < b):
        examples += shards
    return Tiles(examples, queries, keys, heads)


def _tiles_in_cache(scores_shape, key_heads, devices, is_wide, stores):
    """Return queries, keys and heads of a tile that stays in a CPU's cache."""
    _, n, t, s = scores_shape
    limit = LARGE_TILE // (2 if stores else 1)
    if is_wide:
        longest = 2048
    else:
        longest = 512 if stores or n * 512 * 512 <= limit else 256
    keys = s if s <= 640 else _even(s, longest)
    queries, heads = _even(t, 512), key_heads
    if devices == 1:
        while heads > 1 and n // key_heads * heads * queries * keys > limit:
            heads = max(x for x in range(1, heads) if key_heads % x == 0)
    rows = n // key_heads * heads * keys
    return _even(t, max(64, min(queries, limit // rows))), keys, heads


def _even(size: int, limit: int) -> int:
    """Return the size of equal parts of an axis, none above the limit."""
    return math.ceil(size / math.ceil(size / limit))


def _ambient_devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


def _row_parameter(call: Call):
    """Return the row parameter `[b,t,n,1]` of a call's normalizer, or None."""
    normalizer, (b, n, t, s) = call.normalizer, call.scores_shape
    if type(normalizer).row_parameter is Elementwise.row_parameter:
        return None
    row = normalizer.row_parameter(_visible_keys(call.visibility, t, s))
    if row is None:
        return None
    row_btn = jnp.broadcast_to(row, (b, n, t)).swapaxes(1, 2)
    return row_btn[..., None].astype(call.statistics_dtype)


def _visible_keys(visibility: Visibility, t: int, s: int):
    """Count the keys that each query may attend, some queries at a time: `[b|1, n|1, t]`."""
    if visibility.rest is None and visibility.query_ids is None:
        return visibility.visible_keys(t, s)
    rows = _even(t, 256)
    count = math.ceil(t / rows)
    padded = visibility.pad(t, s, count * rows, s)
    parts = jax.lax.map(
        lambda j: padded.tile(j * rows, 0, rows, s).sum(axis=-1, dtype=jnp.int32),
        jnp.arange(count),
    )
    counts = jnp.einsum("jbnt->bnjt", parts)
    return counts.reshape(*counts.shape[:2], -1)[..., :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, *operands):
    return _forward(plan, *operands)[0]


@with_scanned_gradient
def forward(plan: Plan, operands, collected) -> tuple:
    """Compute the output, and of every row what the other passes need.

    Args:
      plan: sizes and scalars.
      operands: query `[b,t,n,h]`; key `[b,s,k,h]`; value `[b,s,k,hv]`; bias as in `Call`; row
        parameter of the normalizer `[b,t,n,1]`, or None; a `TiledMask`, or None; seed and `Place`
        of dropout, or None.
      collected: what the statistics need besides, from `collected_operands`.

    Returns:
      `out [b,t,n,hv]`, of an `Elementwise` normalizer in float32, which its backward pass needs;
      the row's sums, a tuple of `[b,t,n,1]` or None: the maximum m of the scores, log l, and the
      sum of the normalizer's terms; and the results of the `Collector`.
    """
    query, key, value, bias, row, mask, seed = operands
    wide = jnp.promote_types(query.dtype, jnp.float32)
    collector = Collector(plan)
    by_query = jax.tree.map(plan.split_query, (query, row, collected["extra_logit"]))
    count = jnp.arange(plan.tiles.queries)
    is_row = lambda j: j * plan.tiles.queries + count < query.shape[1]
    sets_all = jax.tree.map(plan.split_key, collected["sets"])
    normalizer = plan.normalizer
    if normalizer is not None:
        # Rounded weights do not sum to their denominator, and the backward pass would see that.
        value = value.astype(wide)
    key_all, value_all = plan.split_key(key), plan.split_key(value)
    bias_all = bias if bias is None or isinstance(bias, Bias) else plan.split_scores(bias)
    floor = EMPTY_LSE if normalizer is None else normalizer.floor

    def group_step(_, inputs):
        u, by_query_u, key_u, value_u, sets_u = inputs

        def query_step(kept, inputs):
            j, (query_bkgth, row_tile, extra_logit) = inputs

            def scores_of(m, is_partial):
                operands = query_bkgth, plan.take_keys(key_u, m), bias_all
                return plan.scores(*operands, mask if is_partial else None, (u, j, m))[0]

            def raise_top(top, scores):
                # The maximum cancels in the result: no gradient, and finite for empty rows.
                new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
                new_top = jax.lax.stop_gradient(new_top)
                return new_top, jnp.exp(top - new_top)

            def lse_step(state, m, is_partial):
                top, total = state
                scores = scores_of(m, is_partial)
                top, shrink = raise_top(top, scores)
                return top, shrink * total + jnp.exp(scores - top).sum(axis=-1, keepdims=True)

            def key_step(state, m, is_partial):
                top, total, sum_bkgth, seen = state
                scores = scores_of(m, is_partial)
                if plan.shift == "max":
                    old_top, (top, shrink) = top, raise_top(top, scores)
                    seen = collector.shrink(seen, old_top - top, shrink, total)
                    total, sum_bkgth = shrink * total, shrink * sum_bkgth
                weights, terms = plan.weigh(scores, top, log_total, row_tile)
                seen = collector.see(seen, m, scores, top, weights)
                if terms is not None:
                    total = total + terms.sum(axis=-1, keepdims=True)
                if plan.dropout_rate:
                    weights = weights * plan.dropout(seed, (u, j, m)).astype(wide)
                step = einsum("bkgts,bksh->bkgth", weights, plan.take_keys(value_u, m))
                return top, total, sum_bkgth + step, seen

            rows = query_bkgth.shape[:-1]
            top, total = (plan.full((*rows, 1), x, wide) for x in (floor, 0))
            log_total = None
            if plan.shift == "lse":
                top, total = plan.visit(mask, u, j, lse_step, (top, total))
                log_total = jnp.log(jnp.where(total == 0, 1, total))
                total = jnp.zeros_like(total)
            sum_bkgth = plan.full((*rows, value.shape[-1]), 0, wide)
            start = (top, total, sum_bkgth, collector.start(kept, rows, wide))
            top, total, sum_bkgth, seen = plan.visit(mask, u, j, key_step, start)
            if normalizer is None:
                # A row without keys keeps the initial maximum, EMPTY_LSE.
                total = jnp.where(total == 0, 1, total)
                divisor, log_total = total, jnp.log(total)
                total = None
            elif plan.has_denominator:
                divisor = plan.denominator(total, top, log_total)
            else:
                divisor, total = jnp.ones_like(total), None
            visit = functools.partial(plan.visit, mask, u, j)
            row_sums = (top, log_total, divisor, extra_logit)
            kept, found = collector.finish(visit, kept, seen, row_sums, sets_u, is_row(j))
            out = sum_bkgth / divisor
            if normalizer is None and not plan.is_partial:
                out = out.astype(query.dtype)
            top = None if plan.shift == "none" else top
            return kept, (out, (top, log_total, total), found)

        kept = collector.begin(wide)
        kept, results = loop(query_step, kept, (jnp.arange(plan.counts[1]), by_query_u))
        return None, (results, kept.get("key_mass"))

    inputs = (jnp.arange(plan.counts[0]), by_query, key_all, value_all, sets_all)
    _, (results, key_mass) = loop(group_step, None, inputs)
    out, sums, found = jax.tree.map(plan.join_query, results)
    if key_mass is not None:
        found["key_mass"] = key_mass
    return out, sums, found


def _forward(plan, *operands):
    out, sums, collected = forward(plan, operands[:-1], operands[-1])
    top, log_total, _ = sums
    lse = None
    if not plan.rule:
        lse = (top + log_total)[..., 0].swapaxes(1, 2)
    shown = out if plan.is_partial else out.astype(operands[0].dtype)
    return (shown, lse, sums, collected), (operands[:-1], out, sums)


def _backward(plan, saved, cotangents):
    from attnjax.ops.chunked_bwd import backward

    # Statistics, and the sums that they need, carry no gradient.
    return (*backward(plan, *saved, cotangents[:2]), None, None, None)


_attend.defvjp(_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _gradients_jit(plan, operands, out, sums, cotangents):
    from attnjax.ops.chunked_bwd import backward

    return backward(plan, operands, out, sums, cotangents)
