# SPDX-License-Identifier: Apache-2.0
"""`context_attention`: `attnjax.ops.attention` with its sequence over a mesh axis."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.ops.attention import AttentionOutput, Call, attention
from attnjax.ops.mask import Mask, as_mask
from attnjax.ops.mask.algebra import Lowered
from attnjax.ops.normalizer import Rowwise
from attnjax.ops.statistics import TokenMass, name_of
from attnjax.parallel.context.layout import axis_size, dispatch, undispatch
from attnjax.parallel.context.plan import ContextPlan, plan_context
from attnjax.parallel.context.program import Others, Program, attend
from attnjax.typing import Array


def context_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None = None,
    method: str = "auto",
    plan: ContextPlan | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "context",
    dispatched: bool = False,
    implementation: str | None = None,
    **options: Any,
) -> Array | AttentionOutput:
    """Attend as `attnjax.ops.attention` does, with the sequence divided over a mesh axis.

    Every mask, grouped heads, softmax's relatives, array biases, soft caps, statistics and dropout
    give what one device gives, for every method; gradients too, with a backward pass written by
    hand. Normalizers without a log-sum-exp need a method that gathers whole rows.

    Args:
      query: `[b,t,n,h]`, in global order unless `dispatched`.
      key: `[b,s,k,h]`.
      value: `[b,s,k,hv]`.
      mask: for the sequence in global order.
      method: one of `attnjax.parallel.context.METHODS`.
      plan: from `plan_context`; made from `method` if None.
      mesh: the mesh; the ambient one (`jax.set_mesh`) if None.
      axis: mesh axis of the sequence; examples and heads stay divided as they are.
      dispatched: arrays come in the order of `plan.layout` (see `dispatch`), fillers included, and
        results leave in it. Needs a plan.
      implementation: of `attnjax.ops`, for each block; None for the fastest.
      **options: `bias`, `scale`, `softcap`, `normalizer`, `return_lse`, `statistics`, `gate`,
        `stop_gradient`, `dropout_rate`, `dropout_key`, `tuning` as in `attnjax.ops.attention`.

    Returns:
      As `attnjax.ops.attention`.

    Raises:
      ValueError: as `attnjax.ops.attention` and `plan_context`; the plan is for other sizes; or
        dispatched arrays come without one.
      NotImplementedError: the options ask for probabilities, scores, edits or a `Bias` object,
        which need whole rows or positions of one device.
    """
    ranks = axis_size(mesh, axis)
    if dispatched and plan is None:
        raise ValueError("dispatched arrays need the plan whose layout they are in")
    if plan is not None and plan.layout.ranks != ranks:
        raise ValueError(
            f"the plan is for {plan.layout.ranks} ranks, mesh axis {axis!r} has {ranks}"
        )
    if ranks == 1 and not dispatched:
        return attention(query, key, value, mask=mask, implementation=implementation, **options)
    lengths = plan.lengths if dispatched else (query.shape[1], key.shape[1])
    if plan is not None and not dispatched and plan.lengths != lengths:
        raise ValueError(f"the plan is for lengths {plan.lengths}, the arrays have {lengths}")
    if dispatched and mask is not None:
        # Made for the true lengths; the arrays have fillers besides.
        mask = Lowered(as_mask(mask).visibility(*lengths))
    server = functools.partial(
        _serve, plan=plan, method=method, mesh=mesh, axis=axis, dispatched=dispatched,
        implementation=implementation, lengths=lengths,
    )  # fmt: skip
    return attention(query, key, value, mask=mask, implementation=server, **options)


def _serve(
    call: Call, *, plan, method, mesh, axis, dispatched, implementation, lengths
) -> AttentionOutput:
    name = "context_attention"
    call.refuse(name, "return_probabilities", "return_scores", "edit", "bias objects")
    if isinstance(call.normalizer, Rowwise):
        call.refuse(name, "normalizer")
    n, k = call.query.shape[2], call.key.shape[2]
    if plan is None:
        plan = plan_context(
            call.visibility, lengths[0], axis_size(mesh, axis), n=n, k=k, s=lengths[1],
            method=method, needs_whole_rows=call.normalizer is not None,
        )  # fmt: skip
    if call.normalizer is not None and plan.heads_ways > 1 and jax.tree.leaves(call.normalizer):
        raise ValueError(
            f"parameters of {type(call.normalizer).__name__} may belong to heads, which "
            f"{plan.method!r} divides; choose 'all_gather'"
        )
    if n % plan.heads_ways:
        raise ValueError(f"the plan divides heads by {plan.heads_ways}, which {n} are not")
    sets, names = {}, []
    for statistic in call.statistics:
        names.append(name_of(statistic))
        if isinstance(statistic, TokenMass):
            sets[statistic.name] = jnp.asarray(statistic.indicator)
        elif statistic == "first_token_mass":
            sets[statistic] = (jnp.arange(lengths[1]) == 0)[None]
    program = Program(
        transport=plan.transport, heads_ways=plan.heads_ways, axis_name=axis, mesh=mesh,
        lengths=plan.lengths, heads=(n, k), value_start=call.key.shape[3], scale=call.scale,
        softcap=call.softcap, dropout_rate=call.dropout_rate, tuning=call.tuning,
        implementation=implementation, returns_lse=call.return_lse, statistics=tuple(names),
    )  # fmt: skip
    around = plan.layout.ranks // plan.heads_ways
    others = jax.tree.map(
        jnp.asarray,
        Others(
            visibility=call.visibility,
            queries=plan.layout.positions.reshape(around, -1),
            tables=plan.transport.tables(plan.key_layout),
            dropout_key=call.dropout_key,
            sets=sets,
        ),
    )
    arrays, extra = (call.query, call.key, call.value), call.extra_logit
    by_layout = (plan.layout, plan.key_layout, plan.key_layout)
    if not dispatched:
        to = functools.partial(dispatch, mesh=mesh, axis_name=axis)
        arrays = tuple(to(x, at) for x, at in zip(arrays, by_layout, strict=True))
        if extra is not None and extra.shape[2] > 1:
            extra = to(extra, plan.layout, axis=2)
    out, lse, found = attend(program, arrays, call.bias, call.normalizer, extra, others)
    if not dispatched:
        back = functools.partial(undispatch, mesh=mesh, axis_name=axis)
        out = back(out, plan.layout)
        lse = None if lse is None else back(lse, plan.layout, axis=2)
        found = {
            name: back(x, plan.key_layout if name == "key_mass" else plan.layout, axis=2)
            for name, x in found.items()
        }
    return AttentionOutput(out=out, lse=lse, statistics=found)
