# SPDX-License-Identifier: Apache-2.0
"""Softmax and its relatives with one extra term per row.

An extra term is not a key: masks, biases, segments and dropout do not reach it, every query sees
it, also one that may attend nothing else. Returned probabilities and statistics are about the keys
alone, so rows may sum to less than 1; a log-sum-exp includes the term (merge partial attention with
the term in one part only).

Numbers in brackets are those of "Attention Sink in Transformers: A Survey", arXiv 2604.10098,
section A; "survey" and "code" say whether the form is the survey's or the original authors'.
"""

from typing import ClassVar

import jax.numpy as jnp

from attnjax.ops.normalizer import Finish, SoftmaxFamily, register, with_extra_logit
from attnjax.typing import Array


@register()
class SoftmaxOne(SoftmaxFamily):
    """Softmax with one more logit of 0: weights e^z / (1 + sum e^z). [2, survey]"""

    def extra_logit(self, query, scale, softcap):
        return jnp.zeros((1, query.shape[2], 1), jnp.float32)


@register(("logits",))
class SinkLogit(SoftmaxFamily):
    """Softmax with a learnable logit per head: e^z / (sum e^z + e^logit). [3, code of gpt-oss]

    Attributes:
      logits: `[n]`, or `[1]` for all heads; neither scaled nor capped nor masked.
    """

    logits: Array

    def check(self, n, h, hv):
        _check_heads("logits", self.logits, n, ())

    def extra_logit(self, query, scale, softcap):
        return _per_head(self.logits, query.shape[2])[None, :, None]


@register(("key",))
class KeyBias(SoftmaxFamily):
    """Softmax with a learnable key before the others whose value is 0. [5, code of Gu et al.]

    The survey's form adds the bias to all keys instead, which softmax does not notice (every score
    of a row grows by the same): `key + bias` in front of the call.

    Attributes:
      key: `[n, h]` per head, `[k, h]` per key/value head, or `[1, h]`; without position.
    """

    key: Array
    has_key: ClassVar[bool] = True

    def check(self, n, h, hv):
        _check_heads("key", self.key, n, (h,))

    def extra_logit(self, query, scale, softcap):
        return _score(query, self.key, scale, softcap)


@register(("key", "value"))
class KeyValueBias(SoftmaxFamily):
    """Softmax with a learnable key and value before the others. [4, code of Massive Activations]

    The score is that of any key: scaled and capped.

    Attributes:
      key: `[n, h]` per head, `[k, h]` per key/value head, or `[1, h]`; without position.
      value: `[n, hv]`, `[k, hv]` or `[1, hv]`.
    """

    key: Array
    value: Array
    has_key: ClassVar[bool] = True

    def check(self, n, h, hv):
        _check_heads("key", self.key, n, (h,))
        _check_heads("value", self.value, n, (hv,))

    def extra_logit(self, query, scale, softcap):
        return _score(query, self.key, scale, softcap)

    def finish(self, query, lse, scale, softcap):
        value = _per_head(self.value, query.shape[2])
        return with_extra_logit(self.extra_logit(query, scale, softcap), lse, value)


@register(("value",))
class ValueBias(SoftmaxFamily):
    """Softmax with a learnable vector per head added to the output. [6, code of Gu et al.]

    Attributes:
      value: `[n, hv]` per head, `[k, hv]` per key/value head, or `[1, hv]`.
    """

    value: Array

    def check(self, n, h, hv):
        _check_heads("value", self.value, n, (hv,))

    def finish(self, query, lse, scale, softcap):
        value = _per_head(self.value, query.shape[2])
        return Finish(lse, addition=value.astype(lse.dtype))


@register(("key", "value"))
class ContextBias(SoftmaxFamily):
    """Softmax, and the bias term of a second softmax. [7, code of Systematic Outliers]

    out = softmax(z) . values + share . value,   share = e^z' / (e^z' + sum e^z),   z' = query . key

    The weights of the keys and the log-sum-exp are those of the first softmax.

    Attributes:
      key: `[n, h]` per head, `[k, h]` per key/value head, or `[1, h]`; without position.
      value: `[n, hv]`, `[k, hv]` or `[1, hv]`.
    """

    key: Array
    value: Array
    has_key: ClassVar[bool] = True

    def check(self, n, h, hv):
        _check_heads("key", self.key, n, (h,))
        _check_heads("value", self.value, n, (hv,))

    def finish(self, query, lse, scale, softcap):
        extra = _score(query, self.key, scale, softcap)
        value = _per_head(self.value, query.shape[2])
        return Finish(lse, addition=with_extra_logit(extra, lse, value).addition)


def _score(query_btnh, key, scale, softcap):
    wide = jnp.promote_types(query_btnh.dtype, jnp.float32)
    key_nh = _per_head(key, query_btnh.shape[2]).astype(query_btnh.dtype)
    scores_bnt = scale * jnp.einsum("btnh,nh->bnt", query_btnh, key_nh, preferred_element_type=wide)
    return scores_bnt if softcap is None else softcap * jnp.tanh(scores_bnt / softcap)


def _per_head(parameter, n):
    """Repeat rows for the query heads that share them."""
    parameter = jnp.asarray(parameter)
    return jnp.repeat(parameter, n // parameter.shape[0], axis=0)


def _check_heads(name, parameter, n, rest):
    shape = jnp.shape(parameter)
    if len(shape) != 1 + len(rest) or not shape[0] or n % shape[0] or shape[1:] != rest:
        raise ValueError(
            f"{name} must be {('heads', *rest)} with a number of heads that divides {n}, "
            f"got {shape}"
        )
