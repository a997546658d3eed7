# SPDX-License-Identifier: Apache-2.0
"""Attention whose sequence is divided over a mesh axis: what every rank does.

    forward     (out_i, lse_i) of every block of keys, merged by their log-sum-exps in float32
    backward    dscores = p (dout . value - sum_h(dout out) + dlse) with p = exp(scores - lse): each
                block by itself, given the merged (out, lse)
    statistics  of weights relative to the merged log-sum-exp, block by block

Ranks may also share their heads (Ulysses): tokens of a group of ranks are exchanged for heads
before and back again after. The backward pass is written by hand, so that nothing but one rank's
share of query, key, value, output and log-sum-exp is kept for it; blocks travel again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from attnjax.ops.attention import Call, serve, serve_gradients
from attnjax.ops.dropout import Place
from attnjax.ops.mask.visibility import positions_of, take_axis
from attnjax.ops.merge import merge_partials
from attnjax.ops.normalizer import Normalizer
from attnjax.ops.statistics import TokenMass
from attnjax.ops.tuning import Tuning
from attnjax.parallel.context.layout import as_positions
from attnjax.parallel.context.transport import Transport
from attnjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled-in part of a call.

    Attributes:
      transport: how keys and values travel.
      heads_ways: ranks that share their heads, neighbours on the axis.
      axis_name: of the mesh axis.
      mesh: None for the ambient one.
      lengths: t and s of the whole sequence.
      heads: n and k of the whole.
      query_run: size of a run of `Others.queries`, 0 for none.
      value_start: h, where values begin in a block.
      scale, softcap, dropout_rate, tuning: as in `Call`.
      implementation: of `attnjax.ops`, or None for the fastest.
      returns_lse: whether the log-sum-exp is wanted.
      statistics: names of what is wanted, and of sets of tokens.
    """

    transport: Transport
    heads_ways: int
    axis_name: str
    mesh: Any
    lengths: tuple[int, int]
    heads: tuple[int, int]
    query_run: int
    value_start: int
    scale: float
    softcap: float | None
    dropout_rate: float
    tuning: Tuning
    implementation: str | None
    returns_lse: bool
    statistics: tuple[str, ...]

    @property
    def repeats(self) -> int:
        """How often key/value heads must be repeated so that they can be shared."""
        n, k = self.heads
        return next(
            m for m in range(1, n // k + 1) if k * m % self.heads_ways == 0 and n % (k * m) == 0
        )

    @property
    def by_token(self) -> P:
        """Partition of `[b,t,...]`."""
        return P(None, self.axis_name)

    @property
    def by_row(self) -> P:
        """Partition of `[b,n,t]`."""
        return P(None, None, self.axis_name)

    @property
    def by_rank(self) -> P:
        """Partition of what every rank has of its own, one after another."""
        return P(self.axis_name)

    def shard(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Wrap a function of one rank."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={self.axis_name},
            check_vma=False,
        )

    def to_heads(self, array: Array, heads: int, tokens: int) -> Array:
        """Give away tokens of a rank for heads: axes of the array that hold either."""
        ways = self.heads_ways
        if ways == 1:
            return array
        size = jax.lax.axis_size(self.axis_name)
        groups = [list(range(start, start + ways)) for start in range(0, size, ways)]
        return jax.lax.all_to_all(
            array, self.axis_name, heads, tokens, axis_index_groups=groups, tiled=True
        )

    def to_tokens(self, array: Array, heads: int, tokens: int) -> Array:
        """Undo `to_heads`."""
        return self.to_heads(array, tokens, heads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Others:
    """Arrays that carry no gradient.

    Attributes:
      visibility: normal form of the mask, for the whole sequence.
      queries: of `Layout.tables`, a row for all ranks that share their heads.
      tables: of the transport.
      dropout_key: or None.
      sets: name -> indicator `[b|1, s]` of sets of tokens.
    """

    visibility: Any
    queries: Any
    tables: Any
    dropout_key: Any
    sets: Any

    def specs(self, program: Program) -> "Others":
        """Return how the arrays are divided, as a prefix tree."""
        tables = program.transport.specs(program.axis_name)
        return Others(P(), P(), tables, P(), P())


class Rank:
    """What one rank knows while it works, inside `shard_map`."""

    def __init__(self, program: Program, others: Others, heads: int):
        """Find out which queries and heads are this rank's.

        Args:
          program: the program.
          others: as this rank sees them.
          heads: query heads that this rank works on.
        """
        self.program, self.others, self.heads = program, others, heads
        t, s = program.lengths
        ways, index = program.heads_ways, jax.lax.axis_index(program.axis_name)
        self.queries = as_positions(others.queries[index // ways], program.query_run)
        self.first_head = index % ways * heads if ways > 1 else 0
        visibility = others.visibility.take(self.queries, None, t, s)
        self.visibility = visibility if ways == 1 else visibility.heads(self.first_head, heads)

    def call(self, query, block, positions, bias, normalizer, **options) -> Call:
        """Return the call of this rank's queries on a block of keys."""
        program, others = self.program, self.others
        b, n = query.shape[0], program.heads[0]
        start = program.value_start
        place = None
        if program.dropout_rate:
            heads = self.first_head + jnp.arange(self.heads, dtype=jnp.uint32)
            examples = jnp.arange(b, dtype=jnp.uint32)[:, None] * jnp.uint32(n)
            as_words = lambda x: x.astype(jnp.uint32)
            at = (as_words(positions_of(x)) for x in (self.queries, positions))
            place = Place(examples + as_words(heads), *at)
        visibility = self.visibility.take(None, positions, query.shape[1], program.lengths[1])
        return Call(
            query=query, key=block[..., :start], value=block[..., start:], visibility=visibility,
            bias=None if bias is None else self.take_bias(bias, positions), scale=program.scale,
            softcap=program.softcap, normalizer=normalizer, probability_heads=(), score_heads=(),
            edit=None, dropout_rate=program.dropout_rate,
            dropout_key=others.dropout_key if program.dropout_rate else None,
            tuning=program.tuning, is_partial=True, place=place,
            **{"extra_logit": None, "return_lse": normalizer is None, "statistics": ()} | options,
        )  # fmt: skip

    def take_bias(self, bias, positions):
        """Return the bias of this rank's heads and queries for a block of keys."""
        if bias.shape[1] > 1 and self.program.heads_ways > 1:
            bias = jax.lax.dynamic_slice_in_dim(bias, self.first_head, self.heads, 1)
        for axis, at in ((2, self.queries), (3, positions)):
            if bias.shape[axis] > 1:
                bias = take_axis(bias, at, axis)
        return bias


def _forward_rank(program, query, key, value, bias, normalizer, others):
    exchange = lambda x: program.to_heads(x, 2, 1)
    if program.repeats > 1:
        key, value = (jnp.repeat(x, program.repeats, axis=2) for x in (key, value))
    query, key, value = (exchange(x) for x in (query, key, value))
    block = jnp.concatenate([key, value], axis=-1)
    rank = Rank(program, others, query.shape[2])

    def step(state, block, positions):
        call = rank.call(query, block, positions, bias, normalizer)
        output = serve(call, program.implementation)
        part = (output.out, output.lse)
        if state is None or normalizer is not None:
            return part, output.lse
        return merge_partials([state, part]), output.lse

    fold = program.transport.fold
    (out, lse), parts = fold(block, step, others.tables, program.axis_name)
    out = out.astype(query.dtype)
    shown = program.to_tokens(out, 2, 1)
    shown_lse = program.to_tokens(lse, 1, 2) if program.returns_lse else None
    wanted = jnp.stack(parts) if program.statistics and normalizer is None else None
    saved = jax.tree.map(lambda x: x[None], (query, block, out, lse, wanted))
    return shown, shown_lse, saved


def _backward_rank(program, saved, bias, normalizer, others, dout, dlse):
    query, block, out, lse, _ = jax.tree.map(lambda x: x[0], saved)
    # Else a compiler that sees both passes keeps all blocks of the first for the second.
    block = jax.lax.optimization_barrier(block)
    dout = program.to_heads(dout, 2, 1)
    rank = Rank(program, others, query.shape[2])
    dout = dout.astype(jnp.promote_types(query.dtype, jnp.float32))
    if normalizer is None:
        dlse = jnp.zeros_like(lse) if dlse is None else program.to_heads(dlse, 1, 2)

    def step(state, block, positions):
        if normalizer is None:
            bias_here, pull = bias, lambda dbias: (None,)
            if bias is not None:
                bias_here, pull = jax.vjp(lambda x: rank.take_bias(x, positions), bias)
            call = rank.call(query, block, positions, None, None)
            call = dataclasses.replace(call, bias=bias_here)
            dquery, dkey, dvalue, dbias = serve_gradients(
                call, (out, lse), (dout, dlse), program.implementation
            )
            found = (dquery, *pull(dbias), None)
            dblock = jnp.concatenate([dkey, dvalue], axis=-1)
        else:

            def whole(query, block, bias, normalizer):
                call = rank.call(query, block, positions, bias, normalizer)
                return serve(call, program.implementation).out

            _, pull = jax.vjp(whole, query, block, bias, normalizer)
            dquery, dblock, dbias, dnormalizer = pull(dout)
            found = (dquery, dbias, dnormalizer)
        return found if state is None else jax.tree.map(jnp.add, state, found), dblock

    back = program.transport.fold_back
    (dquery, *shared), dblock = back(block, step, others.tables, program.axis_name)
    start = program.value_start
    dquery, dkey, dvalue = (
        program.to_tokens(x.astype(query.dtype), 2, 1)
        for x in (dquery, dblock[..., :start], dblock[..., start:])
    )
    if program.repeats > 1:
        split = lambda x: x.reshape(*x.shape[:2], -1, program.repeats, x.shape[3]).sum(axis=3)
        dkey, dvalue = split(dkey), split(dvalue)
    # Every rank knows these whole.
    dbias, dnormalizer = jax.tree.map(lambda x: jax.lax.psum(x, program.axis_name), tuple(shared))
    return dquery, dkey, dvalue, dbias, dnormalizer


def _statistics_rank(program, saved, bias, normalizer, extra, others):
    query, block, _, lse, parts = jax.tree.map(lambda x: x[0], saved)
    # Statistics are about weights before dropout.
    rank = Rank(dataclasses.replace(program, dropout_rate=0.0), others, query.shape[2])
    total = lse
    if extra is not None:
        b, n = query.shape[0], program.heads[0]
        whole = jnp.broadcast_to(extra, (b, n, query.shape[1] // program.heads_ways))
        total = jnp.logaddexp(lse, program.to_heads(whole, 1, 2).astype(lse.dtype))
    rows = [name for name in program.statistics if name != "key_mass"]

    def step(state, block, positions):
        index, sums = (0, None) if state is None else state
        sets = [
            TokenMass(take_axis(others.sets[name], positions, 1), name)
            for name in rows
            if name in others.sets
        ]
        named = [name for name in program.statistics if name not in others.sets]
        options = {"statistics": (*named, *sets)}
        if normalizer is None:
            # Beside this block's keys, all the others are one more logit of the denominator.
            below = jnp.minimum(parts[index] - total, 0.0)
            options["extra_logit"] = total + jnp.log(-jnp.expm1(below))
        call = rank.call(query, block, positions, bias, normalizer, **options)
        found = serve(call, program.implementation).statistics
        mass = found["key_mass"].swapaxes(1, 2) if "key_mass" in found else None
        own = {name: found[name] for name in rows}
        if sums is not None:
            own = {
                name: (jnp.maximum if name == "max_probability" else jnp.add)(sums[name], own[name])
                for name in rows
            }
        return (index + 1, own), mass

    back = program.transport.fold_back
    (_, sums), mass = back(block, step, others.tables, program.axis_name)
    found = {name: program.to_tokens(value, 1, 2) for name, value in sums.items()}
    if "key_mass" in program.statistics:
        found["key_mass"] = program.to_tokens(mass, 2, 1).swapaxes(1, 2)
    return found


def _array_specs(program, bias, normalizer, others):
    whole = lambda tree: jax.tree.map(lambda x: P(), tree)
    return whole(bias), whole(normalizer), others.specs(program)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(program, query, key, value, bias, normalizer, others):
    return _attend_forward(program, query, key, value, bias, normalizer, others)[0]


def _attend_forward(program, query, key, value, bias, normalizer, others):
    out, lse, saved = program.shard(
        functools.partial(_forward_rank, program),
        (*(program.by_token,) * 3, *_array_specs(program, bias, normalizer, others)),
        (program.by_token, program.by_row, program.by_rank),
    )(query, key, value, bias, normalizer, others)
    return (out, lse, saved), (saved, bias, normalizer, others)


def _attend_backward(program, kept, cotangents):
    saved, bias, normalizer, others = kept
    dout, dlse, _ = cotangents
    specs = _array_specs(program, bias, normalizer, others)
    gradients = program.shard(
        functools.partial(_backward_rank, program),
        (program.by_rank, *specs, program.by_token, program.by_row),
        (*(program.by_token,) * 3, *specs[:2]),
    )(saved, bias, normalizer, others, dout, dlse)
    return *gradients, None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.jit, static_argnums=0)
def attend(
    program: Program,
    arrays: tuple[Array, Array, Array],
    bias: Array | None,
    normalizer: Normalizer | None,
    extra_logit: Array | None,
    others: Others,
) -> tuple[Array, Array | None, dict[str, Array]]:
    """Attend over all ranks.

    Args:
      program: the compiled-in part.
      arrays: query `[b,t',n,h]`, key `[b,s',k,h]` and value `[b,s',k,hv]`, dispatched.
      bias: rank 4 as in `Call`, in global order, or None.
      normalizer: an `Elementwise`, or None for softmax.
      extra_logit: `[b|1,n,t'|1]` as in `Call`, dispatched.
      others: what carries no gradient.

    Returns:
      `out [b,t',n,hv]`, `lse [b,n,t']` or None, and statistics by name, `[b,n,t']` or `[b,n,s']`;
      all dispatched.
    """
    out, lse, saved = _attend(program, *arrays, bias, normalizer, others)
    found = {}
    if program.statistics:
        saved, bias, normalizer = jax.lax.stop_gradient((saved, bias, normalizer))
        extra_spec = None
        if extra_logit is not None:
            extra_spec = program.by_row if extra_logit.shape[2] > 1 else P()
        specs = _array_specs(program, bias, normalizer, others)
        found = program.shard(
            functools.partial(_statistics_rank, program),
            (program.by_rank, *specs[:2], extra_spec, specs[2]),
            dict.fromkeys(program.statistics, program.by_row),
        )(saved, bias, normalizer, extra_logit, others)
    return out, lse, found
