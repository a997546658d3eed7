# SPDX-License-Identifier: Apache-2.0
"""What attentions are compared with to see what they are worth: none at all.

CAB, arXiv 2210.07661, Section 5.3, takes attention away to measure its benefit. How is not said;
here the sub-layer returns zeros and has no parameters, so that a layer keeps its residual stream
and its channel stage [our design].
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from attnjax.ops.efficient.template import PATTERNS, PatternAttention, Stream, check_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(PatternAttention):
    """Return zeros in every pattern."""

    patterns: ClassVar[frozenset[str]] = frozenset(PATTERNS)
    rotates: ClassVar[bool] = False

    def init(self, key, dim, heads, *, context_dim=None, kernel_init=None):
        del key, context_dim, kernel_init
        check_heads(dim, heads)
        return {}

    def apply(
        self, params, x, context=None, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=None,
    ):  # fmt: skip
        del params, context, query_valid, key_valid, rng, train, core
        return jnp.zeros_like(x)

    def empty_state(self, batch, heads, width, capacity, dtype):
        del heads, width, capacity
        return jnp.zeros((batch, 0), dtype)

    def step(self, params, x, stream):
        del params
        return jnp.zeros_like(x), Stream(stream.position + 1, stream.state)

    def remember(self, params, context, key_valid=None):
        del params, key_valid
        self._need("causal_cross", "remembers a context")
        return jnp.zeros((context.shape[0], 0), context.dtype)

    def recall(self, params, x, memory):
        del params, memory
        return jnp.zeros_like(x)

    def flops(self, length, context_length, dim, heads):
        return 0.0
