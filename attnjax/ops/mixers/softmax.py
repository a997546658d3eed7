# SPDX-License-Identifier: Apache-2.0
"""Softmax attention: over everything, or restricted to a sparse set of keys.

    M = rowsoftmax(Q K^T / sqrt(h)) restricted to S

Q, K, V from W^q, W^k, W^v are [paper symbols]; the sets S are [our design], after the usual sparse
transformers. The core `attnjax.ops.attention` computes all of them and skips tiles outside S.
"""

import dataclasses
import math

import numpy as np

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.mask import Mask
from attnjax.ops.mixers.template import Attention, check_positive, without_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Attention):
    """Every query sees every key (or every key up to its own position).

    Attributes:
      causal: no query sees a later key.
      implementation: passed to `ops.attention`.
    """

    causal: bool = False
    implementation: str | None = None

    def visible(self, length: int) -> Mask:
        """Return S as a mask for sequences of this length."""
        del length
        return masks.causal() if self.causal else masks.full()

    def keys_per_query(self, length: int) -> float:
        """Return the mean number of keys a query sees, or an upper bound."""
        return (length + 1) / 2 if self.causal else length

    def attend(self, params, query, key, value, valid):
        del params
        mask = without_padding(self.visible(query.shape[1]), valid)
        return attention(query, key, value, mask=mask, implementation=self.implementation)

    def weights(self, params, query, key, valid):
        del params
        mask = without_padding(self.visible(query.shape[1]), valid)
        return attention(query, key, key, mask=mask, return_probabilities=True).probabilities

    def mixing_flops(self, length, dim, heads):
        return 4.0 * length * self.keys_per_query(length) * dim

    def mixing_numbers(self, length, dim, heads):
        return length * heads  # the log-sum-exp: tiles are computed anew


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Softmax):
    """A query sees its neighbourhood.

    Attributes:
      window: causal: the keys from `window - 1` before to its own; else up to `window` away on
        both sides.
    """

    window: int = 64

    def __post_init__(self):
        check_positive(self, "window")

    @property
    def reach(self) -> int:
        """Distance of the furthest key."""
        return self.window - 1 if self.causal else self.window

    def visible(self, length):
        return masks.sliding_window(self.reach, 0 if self.causal else self.reach)

    def keys_per_query(self, length):
        return min(length, self.reach + 1 + (0 if self.causal else self.reach))

    def path_length(self, length):
        if length > 1 and self.reach == 0:
            return None
        return max(1, math.ceil((length - 1) / max(1, self.reach)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dilated(Window):
    """The window's keys lie `dilation` apart; the neighbours at distance 1 are seen as well.

    Without those neighbours, positions of different remainders would never meet.

    Attributes:
      dilation: distance between keys of the window.
    """

    dilation: int = 4

    def __post_init__(self):
        check_positive(self, "window", "dilation")

    def visible(self, length):
        return masks.predicate(_Dilated(self.reach, self.dilation, self.causal))

    def keys_per_query(self, length):
        return min(length, super().keys_per_query(length) + (1 if self.causal else 2))

    def path_length(self, length):
        stride = self.dilation * max(1, self.reach)
        return max(1, math.ceil(length / stride) + self.reach + self.dilation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Global(Window):
    """A window, and the first tokens see all and are seen by all.

    Attributes:
      tokens: number of global tokens.
    """

    tokens: int = 4

    def __post_init__(self):
        check_positive(self, "window", "tokens")

    def visible(self, length):
        both = masks.global_sliding_window(self.reach, min(self.tokens, length))
        return both & masks.causal() if self.causal else both

    def keys_per_query(self, length):
        # Rows of global tokens are as long as the sequence.
        return min(length, super().keys_per_query(length) + 2 * self.tokens)

    def path_length(self, length):
        return 1 if self.causal or length <= 1 + self.tokens else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Window):
    """A window and some random keys for each query, drawn once from a seed.

    Attributes:
      keys: random keys per query.
      seed: of the draw, the same for all examples, heads and layers.
    """

    keys: int = 8
    seed: int = 0

    def __post_init__(self):
        check_positive(self, "window", "keys")

    def visible(self, length):
        rng = np.random.default_rng((self.seed, length))
        highest = np.arange(1, length + 1) if self.causal else np.full(length, length)
        lower_rt = np.floor(rng.random((self.keys, length)) * highest).astype(np.int32)
        lower_bnrt = lower_rt[None, None]
        return super().visible(length) | masks.ranges(lower_bnrt, lower_bnrt + 1)

    def keys_per_query(self, length):
        return min(length, super().keys_per_query(length) + self.keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Softmax):
    """A block of queries sees its own block of keys and the one before (unless causal, after).

    Attributes:
      block: tokens of a block; the last one may be shorter.
    """

    block: int = 64

    def __post_init__(self):
        check_positive(self, "block")

    def visible(self, length):
        sizes = [min(self.block, length - start) for start in range(0, length, self.block)]
        index = np.arange(len(sizes))
        kept = np.abs(index[:, None] - index[None, :]) <= 1
        near = masks.blocks(kept, sizes, sizes)
        return near & masks.causal() if self.causal else near

    def keys_per_query(self, length):
        return min(length, (1.5 if self.causal else 3) * self.block)

    def path_length(self, length):
        return max(1, math.ceil(length / self.block) - 1)


@dataclasses.dataclass(frozen=True)
class _Dilated:
    """Sees what `Dilated` does; equal ones are one to the compiler."""

    reach: int
    dilation: int
    is_causal: bool

    def __call__(self, query, key):
        distance = query - key
        near = abs(distance) <= self.reach * self.dilation
        inside = (distance % self.dilation == 0) & near
        inside = inside | (abs(distance) <= 1)
        return inside & (distance >= 0) if self.is_causal else inside
