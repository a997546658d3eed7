# SPDX-License-Identifier: Apache-2.0
"""Materialised attention in plain XLA: the contract every other implementation is held to.

It serves every argument, is differentiable to any order in both modes, and costs `b * n * t * s`
numbers of memory. For short sequences it is also the fastest implementation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.attention import AttentionOutput, Call
from attnjax.ops.bias import Bias
from attnjax.ops.dropout import dropout_factor, dropout_seed, whole_place
from attnjax.ops.normalizer import Rowwise, softmax
from attnjax.ops.statistics import from_probabilities
from attnjax.typing import Array


def attend(call: Call) -> AttentionOutput:
    """Serve any call.

    Args:
      call: the checked arguments.

    Returns:
      An `AttentionOutput` with what the call asks for.
    """
    b, n, t, s = call.scores_shape
    k, wide = call.key.shape[2], call.statistics_dtype
    scores_bnts = masked_scores(call)
    if call.normalizer is None:
        probabilities_bnts, lse_bnt = softmax(scores_bnts)
    elif isinstance(call.normalizer, Rowwise):
        probabilities_bnts, lse_bnt = call.normalizer.weights(scores_bnts), None
    else:
        probabilities_bnts, lse_bnt = elementwise(call, scores_bnts), None
    if call.edit is not None:
        probabilities_bnts = call.edit(probabilities_bnts, lse_bnt)
        if probabilities_bnts.shape != (b, n, t, s):
            raise ValueError(
                f"edit returned shape {probabilities_bnts.shape}, expected {(b, n, t, s)}"
            )
    weights_bnts = probabilities_bnts
    if call.dropout_rate:
        weights_bnts = weights_bnts * _dropout(call)
    out_btkgh = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights_bnts.astype(call.value.dtype).reshape(b, k, n // k, t, s),
        call.value,
        preferred_element_type=wide,
    )
    statistics = {}
    if call.statistics:
        shown_bnts = probabilities_bnts
        if call.extra_logit is not None and call.edit is None:
            share_bnt = jax.nn.sigmoid(lse_bnt - call.extra_logit.astype(wide))
            shown_bnts = shown_bnts * share_bnt[..., None]
        statistics = from_probabilities(shown_bnts, call.statistics)
    pick = lambda array, heads: array[:, np.array(heads)] if heads else None
    return AttentionOutput(
        out=out_btkgh.reshape(b, t, n, call.value.shape[3]).astype(call.out_dtype),
        lse=lse_bnt if call.return_lse else None,
        probabilities=pick(probabilities_bnts, call.probability_heads),
        scores=pick(scores_bnts, call.score_heads),
        statistics=statistics,
    )


def gradients(call: Call, results: tuple, cotangents: tuple) -> tuple:
    """Return a part's contribution to gradients, see `attention.serve_gradients`."""
    call.refuse("reference: gradients of a part", "normalizer", "edit")
    wide, (b, n, t, s) = call.statistics_dtype, call.scores_shape
    k = call.key.shape[2]
    (out, lse), (dout, dlse) = results, cotangents
    by_score = (call.query, call.key, call.bias)

    def score(operands):
        query, key, bias = operands
        return masked_scores(dataclasses.replace(call, query=query, key=key, bias=bias))

    scores_bnts, pull = jax.vjp(score, by_score)
    weights_bnts = jnp.exp(scores_bnts - lse[..., None])
    group = lambda x: x.astype(wide).reshape(b, t, k, n // k, x.shape[3])
    dweights_bnts = jnp.einsum("btkgh,bskh->bkgts", group(dout), call.value.astype(wide)).reshape(
        b, n, t, s
    )
    kept_bnts = weights_bnts
    if call.dropout_rate:
        factor_bnts = _dropout(call)
        dweights_bnts, kept_bnts = dweights_bnts * factor_bnts, weights_bnts * factor_bnts
    shift_bnt = jnp.einsum("btnh,btnh->bnt", dout.astype(wide), out.astype(wide)) - dlse
    dscores_bnts = weights_bnts * (dweights_bnts - shift_bnt[..., None])
    dquery, dkey, dbias = pull(dscores_bnts)[0]
    dvalue = jnp.einsum("bkgts,btkgh->bskh", kept_bnts.reshape(b, k, n // k, t, s), group(dout))
    return dquery.astype(wide), dkey.astype(wide), dvalue, dbias


def _dropout(call: Call) -> Array:
    """Return the dropout factors `[b,n,t,s]` of a call."""
    place = whole_place(*call.scores_shape) if call.place is None else call.place
    return dropout_factor(
        dropout_seed(call.dropout_key),
        call.dropout_rate,
        place.heads[:, :, None, None],
        place.queries[:, None],
        place.keys,
    ).astype(call.statistics_dtype)


def masked_scores(call: Call) -> Array:
    """Return the scores `[b,n,t,s]` of a call, -inf where a query may not attend."""
    b, n, t, s = call.scores_shape
    k, wide = call.key.shape[2], call.statistics_dtype
    query_btkgh = call.query.reshape(b, t, k, n // k, call.query.shape[3])
    scores_bkgts = jnp.einsum(
        "btkgh,bskh->bkgts", query_btkgh, call.key, preferred_element_type=wide
    )
    scores_bnts = call.scale * scores_bkgts.reshape(b, n, t, s)
    if call.softcap is not None:
        scores_bnts = call.softcap * jnp.tanh(scores_bnts / call.softcap)
    bias = call.bias.dense(t, s) if isinstance(call.bias, Bias) else call.bias
    if bias is not None:
        scores_bnts = scores_bnts + bias.astype(wide)
    if not call.visibility.is_full:
        scores_bnts = jnp.where(call.visibility.dense(t, s), scores_bnts, -jnp.inf)
    return scores_bnts


def first_token_scores(call: Call) -> Array:
    """Return the scores `[b,n,t]` of key 0 alone, -inf where a query may not attend it."""
    _, _, t, s = call.scores_shape
    bias = call.bias
    if isinstance(bias, Bias):
        bias = bias.tile(0, 0, t, 1, t, s)
    elif bias is not None:
        bias = bias[..., :1]
    first = dataclasses.replace(
        call,
        key=call.key[:, :1],
        value=call.value[:, :1],
        bias=bias,
        visibility=call.visibility.window(0, t, 0, 1, t, s),
    )
    return masked_scores(first)[..., 0]


def elementwise(call: Call, scores_bnts: Array) -> Array:
    """Return the weights `[b,n,t,s]` of an `Elementwise` normalizer."""
    normalizer = call.normalizer
    _, _, t, s = call.scores_shape
    row = normalizer.row_parameter(call.visibility.visible_keys(t, s))
    row = None if row is None else row[..., None].astype(scores_bnts.dtype)
    shift = None
    if normalizer.shift != "none":
        top = jnp.maximum(scores_bnts.max(axis=-1, keepdims=True), normalizer.floor)
        shift = top = jax.lax.stop_gradient(top)
        if normalizer.shift == "lse":
            # Relative to the maximum, because a large log-sum-exp is rounded too far.
            scores_bnts = scores_bnts - top
            shift = softmax(scores_bnts)[1][..., None]
    weight_bnts = normalizer.weight(scores_bnts, shift, row)
    term_bnts = normalizer.term(scores_bnts, shift, row)
    if term_bnts is None:
        return weight_bnts
    return weight_bnts / normalizer.denominator(term_bnts.sum(axis=-1, keepdims=True), shift)
