# SPDX-License-Identifier: Apache-2.0
"""Exact softmax attention, to everything ("vanilla") or to a window: what others are measured by.

    softmax(q k^T / sqrt(h)) v

Both run on the attention core. CAB, arXiv 2210.07661; the released local attention lets queries see
padded keys (it joins two masks by "and"), which is not reproduced here.
"""

import dataclasses
from typing import Any, ClassVar

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.cache import FullCache, WindowCache, append_and_attend
from attnjax.ops.efficient.template import PATTERNS, PatternAttention
from attnjax.ops.mask import Mask
from attnjax.ops.mixers.template import check_positive, without_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(PatternAttention):
    """Every query sees every key, or every key up to its own position (causal self)."""

    patterns: ClassVar[frozenset[str]] = frozenset(PATTERNS)
    is_exact: ClassVar[bool] = True

    def visible(self) -> Mask:
        """Return which keys a query sees, padding aside."""
        return masks.causal() if self.causal and not self.cross else masks.full()

    def attend(
        self, params, query, key, value, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        del params, query_valid, rng, train
        return core(query, key, value, mask=without_padding(self.visible(), key_valid))

    def empty_state(self, batch: int, heads: int, width: int, capacity: int, dtype: Any):
        return FullCache.empty(
            batch=batch, heads=heads, width=width, capacity=capacity, dtype=dtype
        )

    def attend_step(self, params, query, key, value, state):
        del params
        return append_and_attend(query, key, value, state)

    def keys_per_query(self, context_length: int) -> float:
        """Return the mean number of keys that a query sees, or an upper bound."""
        is_half = self.causal and not self.cross
        return (context_length + 1) / 2 if is_half else context_length

    def attend_flops(self, length, context_length, dim, heads):
        return 4.0 * length * self.keys_per_query(context_length) * dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(Softmax):
    """A query sees its neighbourhood.

    Attributes:
      window: w. Noncausal: the keys up to w away on both sides; causal: the last w keys, its own
        among them.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"noncausal_self", "causal_self"})
    is_exact: ClassVar[bool] = False

    window: int = 15

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "window")

    def visible(self):
        if self.causal:
            return masks.sliding_window(self.window - 1, 0)
        return masks.sliding_window(self.window, self.window)

    def empty_state(self, batch, heads, width, capacity, dtype):
        del capacity
        return WindowCache.empty(
            batch=batch, heads=heads, width=width, window=self.window, dtype=dtype
        )

    def keys_per_query(self, context_length):
        return min(context_length, self.window if self.causal else 2 * self.window + 1)
