# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries to many keys, with the axis of keys cut into parts.

    out_i, lse_i = attention to part i          lse = log(sum_i exp(lse_i))
    out = sum_i exp(lse_i - lse) out_i

While decoding there are too few queries to occupy a machine, but the keys are many: their parts are
attended at the same time, on one device (`splits`) or on all that hold a share of them
(`axis_name`), and merged exactly in float32. Keys are read once; scores of all of them exist, which
is little for a few queries.

    >>> import functools, jax, jax.numpy as jnp
    >>> from attnjax.ops import decode_attention
    >>> random = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    >>> query_btnh, key_bskh = random(0, 2, 1, 4, 8), random(1, 2, 64, 2, 8)
    >>> lengths = jnp.array([64, 5])  # The second example fills one part of eight.
    >>> plain = jax.jit(decode_attention)(query_btnh, key_bskh, key_bskh, lengths)
    >>> in_parts = jax.jit(functools.partial(decode_attention, splits=8))
    >>> split = in_parts(query_btnh, key_bskh, key_bskh, lengths)
    >>> split.shape, bool(jnp.allclose(split, plain, atol=1e-6))
    ((2, 1, 4, 8), True)
"""

import math

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops import reference
from attnjax.ops.attention import (
    AttentionOutput,
    Call,
    check_arrays,
    check_bias,
    check_mask,
    check_normalizer,
    check_number,
    check_softcap,
)
from attnjax.ops.lengths import check_lengths
from attnjax.ops.mask import Mask
from attnjax.ops.merge import merge_partials, merge_shards
from attnjax.ops.normalizer import SoftmaxFamily
from attnjax.typing import Array


def decode_attention(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array | None = None,
    *,
    splits: int = 1,
    axis_name: str | None = None,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    normalizer: str | SoftmaxFamily = "softmax",
    return_lse: bool = False,
) -> Array | AttentionOutput:
    """Attend a few queries to the parts of a long axis of keys and merge what they give.

    Args:
      query: `[b,t,n,h]` floating.
      key: `[b,s,k,h]`, dtype of the query; `k` divides `n`.
      value: `[b,s,k,hv]`, dtype of the query.
      lengths: int `[b]`, number of keys of each example, whose last t positions are those of the
        queries: query j sees the keys before `lengths - t + 1 + j`. An example without keys gives
        0. None: all keys are visible unless the mask says otherwise.
      splits: number of parts that are attended at the same time; one that divides s saves a copy
        of the values.
      axis_name: name of a mesh axis of the surrounding `jax.shard_map` over which the axis of keys
        is sharded in order. Keys and values are then those of this device; queries, lengths and
        mask are the same on all devices of the axis, and so is the result.
      mask: as in `attention`, for the whole axis of keys, besides the lengths. Where the axis is
        sharded it must be a `Mask`.
      bias: floating, broadcastable to `[b,n,t,s]`, for the keys of this device.
      scale, softcap: as in `attention`.
      normalizer: softmax or a relative of it; its extra term is added once, after merging.
      return_lse: also return the log-sum-exp.

    Returns:
      `out [b,t,n,hv]` in the dtype of the query, or an `AttentionOutput` with `lse [b,n,t]`. An
      example whose length exceeds the keys gives NaN when lengths are traced.

    Raises:
      ValueError: an argument cannot mean anything, or a known length exceeds the keys.
      NotImplementedError: the normalizer has no log-sum-exp.
    """
    query, key, value = check_arrays(query, key, value)
    normalizer = check_normalizer(normalizer)
    if not isinstance(normalizer, SoftmaxFamily):
        raise NotImplementedError(
            f"decode_attention: {type(normalizer).__name__} has no log-sum-exp to merge by"
        )
    b, t, n, h = query.shape
    s = key.shape[1]
    normalizer.check(n, h, value.shape[3])
    if not 1 <= splits <= s:
        raise ValueError(f"splits={splits}: choose from 1 to the number of keys, {s}")
    total = s * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    if axis_name is not None and mask is not None and not isinstance(mask, Mask):
        raise ValueError(f"mask of keys sharded over {axis_name!r} must be a Mask, not an array")
    too_long = None
    if lengths is not None:
        lengths = check_lengths(lengths, b, total, f"the number of keys, {total}")
        too_long = (lengths > total) | (lengths < 0)
        seen = _seen(lengths, t)
        mask = seen if mask is None else seen & masks.as_mask(mask)
    visibility = check_mask(mask, b, n, t, total)
    if axis_name is not None:
        start = jax.lax.axis_index(axis_name) * s
        visibility = visibility.window(0, t, start, s, t, total)
    scale = h**-0.5 if scale is None else check_number("scale", scale)
    softcap = check_softcap(softcap)
    call = Call(
        query=query, key=key, value=value, visibility=visibility,
        bias=check_bias(bias, (b, n, t, s)), scale=scale, softcap=softcap, normalizer=None,
        extra_logit=None, return_lse=True, probability_heads=(), score_heads=(), statistics=(),
        edit=None, dropout_rate=0.0, dropout_key=None,
    )  # fmt: skip
    out, lse = _attend_parts(call, splits)
    if axis_name is not None:
        out, lse = merge_shards(out, lse, axis_name)
    if type(normalizer) is not SoftmaxFamily:
        finished = normalizer.finish(query.astype(out.dtype), lse, scale, softcap)
        out, lse = finished.output(out), finished.lse
    if too_long is not None:
        out = jnp.where(too_long[:, None, None, None], jnp.nan, out)
        lse = jnp.where(too_long[:, None, None], jnp.nan, lse)
    out = out.astype(query.dtype)
    return AttentionOutput(out=out, lse=lse) if return_lse else out


def _attend_parts(call, splits):
    """Return the merged output in the wide dtype `[b,t,n,hv]` and `lse [b,n,t]`."""
    b, n, t, s = call.scores_shape
    k, hv = call.value.shape[2:]
    size = math.ceil(s / splits)
    scores, value = reference.masked_scores(call), call.value
    if size * splits > s:
        beyond = size * splits - s
        scores = jnp.pad(scores, ((0, 0),) * 3 + ((0, beyond),), constant_values=-jnp.inf)
        value = jnp.pad(value, ((0, 0), (0, beyond), (0, 0), (0, 0)))
    # Letter z counts the parts.
    weights, lse_bntz = reference.softmax(scores.reshape(b, n, t, splits, size))
    out_zbtkgh = jnp.einsum(
        "bkgtzs,bzskh->zbtkgh",
        weights.reshape(b, k, n // k, t, splits, size).astype(value.dtype),
        value.reshape(b, splits, size, k, hv),
        preferred_element_type=call.statistics_dtype,
    )
    out_zbtnh = out_zbtkgh.reshape(splits, b, t, n, hv)
    return merge_partials([(out_zbtnh[i], lse_bntz[..., i]) for i in range(splits)])


def _seen(lengths, t):
    upper = lengths[:, None] - (t - 1) + jnp.arange(t, dtype=jnp.int32)
    upper = jnp.maximum(upper, 0)[:, None, None, :]
    return masks.ranges(jnp.zeros_like(upper), upper)
