# SPDX-License-Identifier: Apache-2.0
"""Segment by segment with a cache: the recurrence of Transformer-XL.

    M = rowsoftmax(Q K^T / sqrt(h)) over the own segment up to oneself and the segment before

Dai et al., "Transformer-XL", arXiv 1901.02860, Section 3.2: the segment before is a cache that
receives no gradient. Q, K, V are [paper symbols]. Rotary positions may take the place of its
relative position terms [our design].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.mixers import chunks
from attnjax.ops.mixers.template import Attention, check_positive, project, without_padding
from attnjax.ops.positions import rotate
from attnjax.typing import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentRecurrence(Attention):
    """Causal attention to the own segment and the cached one before it.

    Attributes:
      segment: tokens of a segment.
      is_cache_fixed: no gradient flows into the cached segment.
    """

    segment: int = 64
    is_cache_fixed: bool = True

    def __post_init__(self):
        check_positive(self, "segment")

    @property
    def is_causal(self):
        return True

    def mix(self, params, x, valid=None):
        b, t, _ = x.shape
        size = min(self.segment, t)
        known_bt = jnp.ones((b, t), bool) if valid is None else valid
        near_bcs = chunks.with_previous(chunks.split(known_bt, size))
        parts = chunks.split(x, size)
        mixed = self._attend(
            params,
            chunks.fold(parts),
            chunks.fold(chunks.with_previous(parts))[:, :size],
            masks.array(chunks.fold(near_bcs)[:, None, None, :]),
        )
        return chunks.join(mixed, b, t)

    def step(self, params: Params, x: Array, cache: Array | None) -> tuple[Array, Array]:
        """Mix the next segment of a stream.

        Args:
          params: from `init`.
          x: Xh of the segment, `[b,segment,d]`; the last one may be shorter.
          cache: what the call before returned; None at the start.

        Returns:
          Y `[b,t,d]`, and the cache for the next segment.
        """
        mask = masks.full()
        if cache is None:
            cache = jnp.zeros((x.shape[0], self.segment, x.shape[2]), x.dtype)
            mask = masks.array((np.arange(self.segment + x.shape[1]) >= self.segment)[None])
        mixed = self._attend(params, x, cache, mask)
        return self.finish(params, mixed).astype(x.dtype), x

    def _attend(self, params, x, before, mask):
        if self.is_cache_fixed:
            before = jax.lax.stop_gradient(before)
        near_bsd = jnp.concatenate([before, x], axis=1)
        query, key = project(params, "query", x), project(params, "key", near_bsd)
        if self.rotary:
            positions = jnp.arange(near_bsd.shape[1])
            query, key = rotate(query, positions[before.shape[1] :]), rotate(key, positions)
        value = project(params, "value", near_bsd)
        return attention(query, key, value, mask=masks.causal() & mask)

    def weights(self, params, query, key, valid):
        del params
        segment = np.arange(query.shape[1]) // self.segment
        mask = masks.causal() & masks.array(segment[:, None] - segment[None, :] <= 1)
        mask = without_padding(mask, valid)
        return attention(query, key, key, mask=mask, return_probabilities=True).probabilities

    def mixing_flops(self, length, dim, heads):
        return 4.0 * length * min(length, 1.5 * self.segment) * dim

    def mixing_numbers(self, length, dim, heads):
        return 2.0 * length * dim + length * heads

    def path_length(self, length):
        return max(1, math.ceil(length / self.segment) - 1)
