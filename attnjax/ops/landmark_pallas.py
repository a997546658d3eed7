# SPDX-License-Identifier: Apache-2.0
"""Landmark attention for TPUs in Pallas: a tile of keys is one block with its landmark.

Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300, Section 3.1. With scores z, over the
normal keys of block b: p_b their softmax, o_b = p_b . value, inner_b their log-sum-exp. A block's
logit x_b is inner_b if it is the query's own block, else the score of its landmark:

    lse = log sum_b exp x_b        share_b = exp(x_b - lse)        out = sum_b share_b o_b

The forward kernel saves inner_b and lse. Backward, with c_b = dout . o_b, D = dout . out - dlse:

    dz_j        = share_b p_bj (dout . value_j - c_b)    of an earlier block, - D instead if own
    dz_landmark = share_b (c_b - D)                      of an earlier block
    dvalue_j    = sum over queries of share_b p_bj dout

Blocks are padded to whole lanes behind the landmark, in memory too. Products of float32 inputs
follow `jax.default_matmul_precision`. No kernel here has yet run on a TPU.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.pallas_tpu_tile import (
    LANES,
    NN,
    NT,
    TN,
    dot,
    find_chip,
    interpretation,
    padded,
    to_column,
)
from attnjax.ops.partition import large_axes, vary_alike
from attnjax.typing import Array

NAME = "landmark pallas_tpu"
_MOST_SLOTS = 2048
"""Of a block: more do not fit the memory of a chip with their scores."""


def attend(
    query: Array, key: Array, value: Array, *, block: int, scale: float
) -> tuple[Array, Array]:
    """Attend causally through regular landmarks on a TPU, differentiably.

    Args:
      query: `[b,t,n,h]` float32 or bfloat16.
      key: `[b,s,k,h]` of the same dtype; `k` divides `n`.
      value: `[b,s,k,hv]` of the same dtype.
      block: landmarks are the keys block - 1, 2 block - 1, ...; divides s - t.
      scale: factor of the raw scores.

    Returns:
      out `[b,t,n,hv]` in the dtype of the query, and the log-sum-exp float32 `[b,n,t]`.

    Raises:
      NotImplementedError: there is no TPU; the ambient mesh divides something; or dtypes, sizes or
        the offset of the queries are not served.
    """
    chip = find_chip()
    (b, t), s = query.shape[:2], key.shape[1]
    if (s - t) % block:
        raise NotImplementedError(
            f"{NAME}: {s} keys less {t} queries are no multiple of block={block}"
        )
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in (jnp.float32, jnp.bfloat16):
        names = sorted(map(str, dtypes))
        raise NotImplementedError(f"{NAME}: inputs are {names}, not all float32 or all bfloat16")
    if b == 0 or t == 0:
        raise NotImplementedError(f"{NAME}: empty inputs are not served")
    if block > _MOST_SLOTS:
        raise NotImplementedError(f"{NAME}: block={block} is above {_MOST_SLOTS}")
    if large := large_axes(jax.sharding.get_abstract_mesh()):
        raise NotImplementedError(f"{NAME}: mesh axis {large[0]!r} needs shard_map around this")
    rows = LANES if t <= LANES else 2 * LANES
    plan = _Plan(t, s, block, rows, scale, chip.vmem, interpretation())
    return _attend(plan, *vary_alike((query, key, value))[1])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of a call: queries, keys, slots of a block, queries of a tile."""

    t: int
    s: int
    block: int
    rows: int
    scale: float
    vmem: int
    interpret: Any

    @property
    def width(self):
        return padded(self.block)

    @property
    def count(self):
        return math.ceil(self.s / self.block)

    @property
    def tiles(self):
        return math.ceil(self.t / self.rows)

    def by_query(self, array_btnh):
        """Return `[b,n,t,h]` with t padded to whole tiles."""
        widths = ((0, 0), (0, self.tiles * self.rows - self.t), (0, 0), (0, 0))
        return jnp.pad(array_btnh, widths).swapaxes(1, 2)

    def by_block(self, array_bskh):
        """Return `[b,k,count,width,h]`, blocks padded behind their landmarks."""
        b, s, k, h = array_bskh.shape
        array = jnp.pad(array_bskh, ((0, 0), (0, self.count * self.block - s), (0, 0), (0, 0)))
        array = array.reshape(b, self.count, self.block, k, h).transpose(0, 3, 1, 2, 4)
        return jnp.pad(array, ((0, 0),) * 3 + ((0, self.width - self.block), (0, 0)))

    def from_blocks(self, array_bkcwh):
        """Undo `by_block`."""
        array = array_bkcwh[:, :, :, : self.block].transpose(0, 2, 3, 1, 4)
        b, c, w, k, h = array.shape
        return array.reshape(b, c * w, k, h)[:, : self.s]

    def to_rows(self, array_bnt):
        """Return `[b,n,1,t]` with t padded to whole tiles."""
        after = self.tiles * self.rows - self.t
        return jnp.pad(array_bnt, ((0, 0), (0, 0), (0, after)))[:, :, None]

    def is_seen(self, i, j):
        """Whether any query of tile i sees block j."""
        return j * self.block < (i + 1) * self.rows + self.s - self.t

    def scores(self, query, key, i, j):
        """Return scores `[rows,width]`, visible normal keys, own rows, and landmark scores."""
        z = dot(query, key, NT) * self.scale
        row = i * self.rows + jax.lax.broadcasted_iota(jnp.int32, z.shape, 0) + self.s - self.t
        slot = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
        last = row - j * self.block
        is_normal = (slot < self.block - 1) & (slot <= last)
        is_landmark = (slot == self.block - 1) & (last >= self.block)
        # Of a column of equal lanes, one is enough.
        is_own = last[:, :1] < self.block
        gate = jnp.where(is_landmark, z, 0).sum(axis=1, keepdims=True)
        return z, is_normal, is_landmark, is_own, gate

    def call(self, kernel, *, name, grid, parallel, inputs, results, scratch=()):
        """Run a kernel over pairs of (array or shape, BlockSpec)."""
        varying = jax.typeof(inputs[0][0]).manual_axis_type
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in results],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x, _ in results
            ],
            scratch_shapes=list(scratch),
            interpret=self.interpret or False,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * parallel
                + ("arbitrary",) * (len(grid) - parallel),
                vmem_limit_bytes=self.vmem * 15 // 16,
            ),
            name=name,
        )(*(array for array, _ in inputs))


def _specs(plan, at):
    """Return makers of specs; `at` turns grid indices into (b, head, key head, i, j)."""

    def by_query(h):
        place = lambda b, n, _, i, j: (b, n, i, 0)
        return pl.BlockSpec((None, None, plan.rows, h), lambda *g: place(*at(*g)))

    def by_block(h):
        place = lambda b, _, k, i, j: (b, k, j, 0, 0)
        return pl.BlockSpec((None, None, None, plan.width, h), lambda *g: place(*at(*g)))

    row = pl.BlockSpec(
        (None, None, 1, plan.rows), lambda *g: (lambda b, n, _, i, j: (b, n, 0, i))(*at(*g))
    )
    inner = pl.BlockSpec(
        (None, None, None, 1, plan.rows),
        lambda *g: (lambda b, n, _, i, j: (b, n, j, 0, i))(*at(*g)),
    )
    return by_query, by_block, row, inner


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, key, value):
    return _attend_fwd(plan, query, key, value)[0]


@functools.partial(jax.jit, static_argnums=0)
def _attend_fwd(plan, query, key, value):
    b, t, n, h = query.shape
    k, hv = value.shape[2:]
    long, group = plan.tiles * plan.rows, n // k
    by_query, by_block, row, inner = _specs(plan, lambda b, n, i, j: (b, n, n // group, i, j))

    def kernel(*refs):
        query_ref, key_ref, value_ref, out_ref, lse_ref, inner_ref, acc, top, total = refs
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _():
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
            top[...] = jnp.full(top.shape, EMPTY_LSE, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)

        @pl.when(plan.is_seen(i, j))
        def _():
            z, is_normal, _, is_own, gate = plan.scores(query_ref[...], key_ref[...], i, j)
            largest = jnp.where(is_normal, z, EMPTY_LSE).max(axis=1, keepdims=True)
            weights = jnp.where(is_normal, jnp.exp(z - largest), 0)
            mass = weights.sum(axis=1, keepdims=True)
            is_empty = mass == 0
            mass = jnp.where(is_empty, 1, mass)
            inner_lse = jnp.where(is_empty, EMPTY_LSE, largest + jnp.log(mass))
            value = value_ref[...]
            out = dot(weights.astype(value.dtype), value, NN) / mass
            logit = jnp.where(is_own, inner_lse, gate)
            old = top[:, :1]
            new = jnp.maximum(old, logit)
            shrink = jnp.exp(old - new)
            share = jnp.where(is_empty, 0, jnp.exp(logit - new))
            acc[...] = shrink * acc[...] + share * out
            total[...] = shrink * total[...] + share
            top[...] = jnp.broadcast_to(new, top.shape)
            inner_ref[...] = jnp.broadcast_to(inner_lse, top.shape).T[:1]

        @pl.when(j == plan.count - 1)
        def _():
            is_empty = total[...] == 0
            safe = jnp.where(is_empty, 1, total[...])
            out_ref[...] = (acc[...] / safe[:, :1]).astype(out_ref.dtype)
            lse_ref[...] = jnp.where(is_empty, EMPTY_LSE, top[...] + jnp.log(safe)).T[:1]

    column = pltpu.VMEM((plan.rows, LANES), jnp.float32)
    out, lse, inner_lse = plan.call(
        kernel,
        name="landmark_forward",
        grid=(b, n, plan.tiles, plan.count),
        parallel=3,
        inputs=[
            (plan.by_query(query), by_query(h)),
            (plan.by_block(key), by_block(h)),
            (plan.by_block(value), by_block(hv)),
        ],
        results=[
            (jax.ShapeDtypeStruct((b, n, long, hv), query.dtype), by_query(hv)),
            (jax.ShapeDtypeStruct((b, n, 1, long), jnp.float32), row),
            (jax.ShapeDtypeStruct((b, n, plan.count, 1, long), jnp.float32), inner),
        ],
        scratch=[pltpu.VMEM((plan.rows, hv), jnp.float32), column, column],
    )
    out, lse = out[:, :, :t].swapaxes(1, 2), lse[:, :, 0, :t]
    return (out, lse), (query, key, value, out, lse, inner_lse)


@functools.partial(jax.jit, static_argnums=0)
def _attend_bwd(plan, saved, cotangents):
    saved, (dout, dlse) = vary_alike((saved, cotangents))[1]
    query, key, value, out, lse, inner_lse = saved
    b, _, n, h = query.shape
    k, hv = value.shape[2:]
    long, group = plan.tiles * plan.rows, n // k
    shift = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32) - dlse
    arrays = [
        *(plan.by_query(x) for x in (query, dout)),
        *(plan.by_block(x) for x in (key, value)),
        *(plan.to_rows(x) for x in (lse, shift)),
        inner_lse,
    ]

    def inputs(specs):
        by_query, by_block, row, inner = specs
        places = [by_query(h), by_query(hv), by_block(h), by_block(hv), row, row, inner]
        return list(zip(arrays, places, strict=True))

    def tile(refs, i, j):
        """Return the weights of a tile and the gradients of its raw scores."""
        query_ref, dout_ref, key_ref, value_ref, lse_ref, shift_ref, inner_ref = refs
        z, is_normal, is_landmark, is_own, gate = plan.scores(query_ref[...], key_ref[...], i, j)
        lse, shift, inner = (to_column(x[...])[:, :1] for x in (lse_ref, shift_ref, inner_ref))
        p = jnp.where(is_normal, jnp.exp(z - inner), 0)
        is_empty = inner <= EMPTY_LSE
        share = jnp.where(is_empty, 0, jnp.exp(jnp.where(is_own, inner, gate) - lse))
        dweights = dot(dout_ref[...], value_ref[...], NT)
        mean = (p * dweights).sum(axis=1, keepdims=True)
        dscores = share * p * (dweights - jnp.where(is_own, shift, mean))
        dscores += jnp.where(is_landmark, share * (mean - shift), 0)
        return share * p, dscores * plan.scale

    def dquery_kernel(*refs):
        i, j = pl.program_id(2), pl.program_id(3)
        dquery_ref = refs[-1]

        @pl.when(j == 0)
        def _():
            dquery_ref[...] = jnp.zeros(dquery_ref.shape, jnp.float32)

        @pl.when(plan.is_seen(i, j))
        def _():
            key = refs[2][...]
            dquery_ref[...] += dot(tile(refs[:-1], i, j)[1].astype(key.dtype), key, NN)

    def dkey_kernel(*refs):
        j, member, i = (pl.program_id(axis) for axis in (2, 3, 4))
        dkey_ref, dvalue_ref = refs[-2:]

        @pl.when((member == 0) & (i == 0))
        def _():
            dkey_ref[...] = jnp.zeros(dkey_ref.shape, jnp.float32)
            dvalue_ref[...] = jnp.zeros(dvalue_ref.shape, jnp.float32)

        @pl.when(plan.is_seen(i, j))
        def _():
            weights, dscores = tile(refs[:-2], i, j)
            query, dout = refs[0][...], refs[1][...]
            dkey_ref[...] += dot(dscores.astype(query.dtype), query, TN)
            dvalue_ref[...] += dot(weights.astype(dout.dtype), dout, TN)

    specs = _specs(plan, lambda b, n, i, j: (b, n, n // group, i, j))
    (dquery,) = plan.call(
        dquery_kernel,
        name="landmark_dquery",
        grid=(b, n, plan.tiles, plan.count),
        parallel=3,
        inputs=inputs(specs),
        results=[(jax.ShapeDtypeStruct((b, n, long, h), jnp.float32), specs[0](h))],
    )
    specs = _specs(plan, lambda b, k, j, member, i: (b, k * group + member, k, i, j))
    blocks = b, k, plan.count, plan.width
    dkey, dvalue = plan.call(
        dkey_kernel,
        name="landmark_dkey",
        grid=(b, k, plan.count, group, plan.tiles),
        parallel=3,
        inputs=inputs(specs),
        results=[
            (jax.ShapeDtypeStruct((*blocks, width), jnp.float32), specs[1](width))
            for width in (h, hv)
        ],
    )
    dquery = dquery[:, :, : plan.t].swapaxes(1, 2)
    return (
        dquery.astype(query.dtype),
        plan.from_blocks(dkey).astype(key.dtype),
        plan.from_blocks(dvalue).astype(value.dtype),
    )


_attend.defvjp(_attend_fwd, _attend_bwd)
