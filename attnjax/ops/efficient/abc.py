# SPDX-License-Identifier: Apache-2.0
"""Attention with bounded memory (ABC): keys and values are written into a fixed number of slots.

    a_jr = k_j . C_r,   K~_ir = sum_{j<=i} e^{a_jr} k_j / sum_{j<=i} e^{a_jr}    (V~ by v_j . C'_r)
    out_i = sum_r softmax_r(q_i . K~_ir / sqrt(h)) V~_ir

Peng et al., "ABC: Attention with Bounded-memory Control", arXiv 2110.02488, Section 4 (the learnt
control of ABC-MLP); where attention is not causal, all keys are written before the first query
reads. C and C' are shared by the heads, as in the code of CAB (arXiv 2210.07661).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PATTERNS, PatternAttention
from attnjax.ops.mixers import chunks
from attnjax.ops.mixers.template import check_positive, without_padding
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.typing import Array

CHUNK = 64
"""Tokens of the causal form that are handled at once."""

HIGHEST = 80.0
"""Exponents beyond this one are not taken: e^88 overflows."""

_DRAW = jax.nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What was written so far.

    Attributes:
      key: K~, float32 `[b,n,r,h]`.
      key_lse: log of the summed weights of the keys, float32 `[b,n,r]`.
      value: V~, like the keys.
      value_lse: likewise.
    """

    key: Array
    key_lse: Array
    value: Array
    value_lse: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abc(PatternAttention):
    """Attend to slots that keys and values are written into.

    Attributes:
      landmarks: r, number of slots.
      compat: the causal form as it was released, whose slots hold the last token only: without the
        sum over j in the numerators of K~ and V~.
    """

    patterns: ClassVar[frozenset[str]] = frozenset(PATTERNS)

    landmarks: int = 16
    compat: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "landmarks")

    def own_params(self, key, dim, heads):
        keys = jax.random.split(key)
        shape = (dim // heads, self.landmarks)
        return {
            name: _DRAW(k, shape, jnp.float32)
            for name, k in zip(("control_key", "control_value"), keys, strict=True)
        }

    def attend(
        self, params, query, key, value, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        del query_valid, rng, train, core
        if not self.causal or self.cross:
            summary = self.summarise(params, key, value, key_valid)
            return self.attend_summary(params, query, summary)
        b, t, n, h = query.shape
        valid = jnp.ones((b, t), bool) if key_valid is None else key_valid
        size = min(CHUNK, t)
        # What is filled up to whole chunks is not valid.
        parts = [jnp.moveaxis(chunks.split(x, size), 1, 0) for x in (query, key, value, valid)]
        # The weights of a chunk are worth less than the memory they would take until the way back.
        step = jax.checkpoint(lambda slots, part: self._write_and_read(params, slots, *part))
        _, out = jax.lax.scan(step, self._empty(b, n, h), tuple(parts))
        return jnp.moveaxis(out, 0, 1).reshape(b, -1, n, h)[:, :t]

    def summarise(self, params, key, value, key_valid):
        seen = without_padding(masks.full(), key_valid)
        slots = []
        for x_bsnh, name in ((key, "control_key"), (value, "control_value")):
            control_hr = params[name].astype(x_bsnh.dtype)
            reader = jnp.broadcast_to(
                control_hr.T[None, :, None, :],
                (x_bsnh.shape[0], self.landmarks, *x_bsnh.shape[2:]),
            )
            slots.append(attention(reader, x_bsnh, x_bsnh, mask=seen, scale=1.0))
        return tuple(slots)

    def attend_summary(self, params, query, summary):
        del params
        return attention(query, *summary)

    def empty_state(self, batch, heads, width, capacity, dtype):
        del capacity, dtype
        return self._empty(batch, heads, width)

    def attend_step(self, params, query, key, value, state):
        valid = jnp.ones(query.shape[:2], bool)
        state, out = self._write_and_read(params, state, query, key, value, valid)
        return out, state

    def attend_flops(self, length, context_length, dim, heads):
        r = self.landmarks
        if not self.causal or self.cross:
            return 4.0 * r * dim * (2 * context_length + length)
        if self.compat:
            return 4.0 * length * r * dim
        chunk = min(CHUNK, length)
        return length * (4.0 * chunk * (dim + r * heads) + 12.0 * r * dim)

    def _empty(self, b, n, h):
        slots = jnp.zeros((b, n, self.landmarks, h), jnp.float32)
        lse = jnp.full((b, n, self.landmarks), EMPTY_LSE, jnp.float32)
        return Slots(slots, lse, slots, lse)

    def _write_and_read(self, params, slots, query, key, value, valid):
        """Write the tokens of a chunk, `[b,c,n,h]` each, and read what each of them knows."""
        dtype, scale = query.dtype, query.shape[-1] ** -0.5
        query, key, value = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (query, key, value))
        key, value = (jnp.where(valid[:, None, :, None], x, 0) for x in (key, value))
        key_logit, key_lse = _logits(params["control_key"], key, valid, slots.key_lse)
        value_logit, value_lse = _logits(params["control_value"], value, valid, slots.value_lse)
        if self.compat:
            own_bni = jnp.einsum("bnih,bnih->bni", query, key) * scale
            scores_bnir = jnp.exp(key_logit - key_lse) * own_bni[..., None]
            reads_bnir = jax.nn.softmax(scores_bnir) * jnp.exp(value_logit - value_lse)
            out_bnih = reads_bnir.sum(axis=-1, keepdims=True) * value
        else:
            products_bnij = jnp.tril(scale * jnp.einsum("bnih,bnjh->bnij", query, key))
            kept_bnir = jnp.exp(slots.key_lse[:, :, None] - key_lse)
            far_bnir = scale * jnp.einsum("bnih,bnrh->bnir", query, slots.key)
            near_bnir = _by_shares(_sum_over_tokens, products_bnij, key_logit, key_lse)
            reads_bnir = jax.nn.softmax(near_bnir + kept_bnir * far_bnir)
            weights_bnij = _by_shares(_sum_over_slots, reads_bnir, value_logit, value_lse)
            kept_bnir = jnp.exp(slots.value_lse[:, :, None] - value_lse)
            out_bnih = jnp.einsum("bnij,bnjh->bnih", jnp.tril(weights_bnij), value)
            out_bnih += jnp.einsum("bnir,bnrh->bnih", reads_bnir * kept_bnir, slots.value)
        slots = Slots(
            *_written(slots.key, slots.key_lse, key_logit, key_lse[:, :, -1], key),
            *_written(slots.value, slots.value_lse, value_logit, value_lse[:, :, -1], value),
        )
        return slots, jnp.swapaxes(out_bnih, 1, 2).astype(dtype)


def _logits(control_hr, x_bnjh, valid_bj, lse_bnr):
    """Return the log-weights `[b,n,j,r]` of tokens, and those summed up to each of them."""
    logit_bnjr = jnp.einsum("bnjh,hr->bnjr", x_bnjh, control_hr.astype(jnp.float32))
    logit_bnjr = jnp.where(valid_bj[:, None, :, None], logit_bnjr, EMPTY_LSE)
    local_bnjr = jax.lax.cumlogsumexp(logit_bnjr, axis=2)
    return logit_bnjr, jnp.logaddexp(local_bnjr, lse_bnr[:, :, None])


def _by_shares(combine, x, logit_bnjr, lse_bnir):
    """Combine x with the shares e^(logit_j - lse_i) of the tokens j of a chunk in the slots of i.

    A share is the product of a factor of j and one of i, so that combining is a matrix product,
    unless a token's logits exceed all before by so much that one of the factors overflows.
    """
    is_empty_bnir = lse_bnir < EMPTY_LSE / 2
    top_bn1r = jnp.maximum(logit_bnjr.max(axis=2, keepdims=True), lse_bnir[:, :, :1])
    top_bn1r = jax.lax.stop_gradient(top_bn1r)
    rise_bnir = jnp.where(is_empty_bnir, 0, top_bn1r - lse_bnir)

    def factored():
        of_bnir = jnp.where(is_empty_bnir, 0, jnp.exp(jnp.minimum(rise_bnir, HIGHEST)))
        return combine(x, of_bnir, jnp.exp(logit_bnjr - top_bn1r))

    def apart():
        past = jnp.tril(jnp.ones((lse_bnir.shape[2], logit_bnjr.shape[2]), bool))[..., None]
        difference = logit_bnjr[:, :, None] - lse_bnir[:, :, :, None]
        shares = jnp.exp(jnp.where(past & ~is_empty_bnir[:, :, :, None], difference, EMPTY_LSE))
        return combine(x, shares)

    return jax.lax.cond(rise_bnir.max() < HIGHEST, factored, apart)


def _sum_over_tokens(x_bnij, *shares):
    """Return sum_j x_ij share_ijr, for shares `[b,n,i,j,r]` or their factors."""
    if len(shares) == 1:
        return (x_bnij[..., None] * shares[0]).sum(axis=3)
    of_bnir, of_bnjr = shares
    return jnp.einsum("bnij,bnjr->bnir", x_bnij, of_bnjr) * of_bnir


def _sum_over_slots(x_bnir, *shares):
    """Return sum_r x_ir share_ijr, likewise."""
    if len(shares) == 1:
        return (x_bnir[:, :, :, None] * shares[0]).sum(axis=-1)
    of_bnir, of_bnjr = shares
    return jnp.einsum("bnir,bnjr->bnij", x_bnir * of_bnir, of_bnjr)


def _written(slots_bnrh, old_lse_bnr, logit_bnjr, lse_bnr, x_bnjh):
    """Return the slots with a chunk's tokens in them, and the log of the summed weights."""
    kept_bnr1 = jnp.exp(old_lse_bnr - lse_bnr)[..., None]
    share_bnjr = jnp.exp(logit_bnjr - lse_bnr[:, :, None])
    return kept_bnr1 * slots_bnrh + jnp.einsum("bnjr,bnjh->bnrh", share_bnjr, x_bnjh), lse_bnr
