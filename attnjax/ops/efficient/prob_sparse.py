# SPDX-License-Identifier: Apache-2.0
"""ProbSparse: exact attention for the few queries whose scores are far from uniform.

    M_i = max_{j in sample} q_i . k_j - sum_{j in sample} q_i . k_j / N
    out_i = softmax attention for the u queries of largest M, the mean of all values for the rest

Zhou et al., "Informer", arXiv 2012.07436, Eq. 4 to 6 and Algorithm 1: U = c ceil(ln N) keys are
drawn for every query, and u = c ceil(ln N) queries are exact. The choice has no gradient.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PatternAttention
from attnjax.ops.mixers.template import check_positive, masked, without_padding
from attnjax.ops.normalizer import EMPTY_LSE

_POWERS = tuple(math.floor(math.exp(k)) for k in range(22))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbSparse(PatternAttention):
    """Exact rows for some queries, the mean of the values for the others.

    What is drawn for a query depends on the key and on its position alone, so that neither heads
    nor padding change it.

    Attributes:
      factor: c.
      seed: of the sample where no key is given.
      mix: take heads for positions before the output projection, as the release of Informer does
        in its decoder: `[b,n,t,h]` is read as if it were `[b,t,n,h]`. Padding then changes results.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"noncausal_self"})
    is_random: ClassVar[bool] = True

    factor: int = 5
    seed: int = 0
    mix: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "factor")

    def attend(
        self, params, query, key, value, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        del params, train, core
        b, t, n, h = query.shape
        valid = jnp.ones((b, t), bool) if key_valid is None else key_valid
        count_b = valid.sum(axis=1)
        most = self.count(t)
        rng = jax.random.key(self.seed) if rng is None else rng
        measure_bnt = self._measure(rng, query, key, valid, count_b)
        seen = valid if query_valid is None else query_valid
        measure_bnt = jnp.where(seen[:, None], measure_bnt, EMPTY_LSE)
        _, chosen_bnu = jax.lax.top_k(measure_bnt, most)
        chosen_bun = jnp.swapaxes(chosen_bnu, 1, 2)
        picked_bunh = jnp.take_along_axis(query, chosen_bun[..., None], axis=1)
        exact_bunh = attention(
            picked_bunh, key, value, mask=without_padding(masks.full(), key_valid)
        )
        total_bnh = masked(value, key_valid).astype(jnp.float32).sum(axis=1)
        mean_bnh = total_bnh / count_b.clip(1)[:, None, None]
        out_btnh = jnp.broadcast_to(mean_bnh[:, None], query.shape).astype(query.dtype)
        # Rows beyond an example's own number go nowhere.
        is_own_bu1 = jnp.arange(most)[:, None] < self.count(count_b)[:, None, None]
        target_bun = jnp.where(is_own_bu1, chosen_bun, t)
        place = (jnp.arange(b)[:, None, None], target_bun, jnp.arange(n))
        out_btnh = out_btnh.at[place].set(exact_bunh, mode="drop")
        return jnp.swapaxes(out_btnh, 1, 2).reshape(b, t, n, h) if self.mix else out_btnh

    def count(self, length):
        """Return c ceil(ln N), from 1 to N, for a number or an int array of them."""
        logarithm = sum((length > power) * 1 for power in _POWERS)
        if isinstance(length, int):
            return max(1, min(self.factor * logarithm, length))
        return jnp.minimum(self.factor * logarithm, length).clip(1)

    def draw(self, rng, length, number):
        """Return where in its keys each query looks, float32 `[length]` in [0, 1).

        Args:
          rng: typed key.
          length: t.
          number: how often it has looked before.
        """
        look = jax.random.fold_in(rng, number)
        draw = lambda position: jax.random.uniform(jax.random.fold_in(look, position))
        return jax.vmap(draw)(jnp.arange(length))

    def _measure(self, rng, query, key, valid, count_b):
        """Return M `[b,n,t]` float32."""
        # Valid keys first, so that a drawn rank is a place.
        order_bs = jnp.argsort(~valid, axis=1, stable=True)
        query, key = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (query, key))
        key = jnp.take_along_axis(key, order_bs[:, :, None, None], axis=1)
        own_b = self.count(count_b)

        def look(measured, u):
            top_btn, sum_btn = measured
            rank_bt = (self.draw(rng, query.shape[1], u) * count_b[:, None]).astype(jnp.int32)
            rank_bt = jnp.minimum(rank_bt, count_b[:, None].clip(1) - 1)
            drawn_btnh = jnp.take_along_axis(key, rank_bt[:, :, None, None], axis=1)
            score_btn = jnp.sum(query * drawn_btnh, axis=-1)
            is_own = (u < own_b)[:, None, None]
            top_btn = jnp.where(is_own, jnp.maximum(top_btn, score_btn), top_btn)
            return (top_btn, sum_btn + jnp.where(is_own, score_btn, 0)), None

        start = jnp.full(query.shape[:3], EMPTY_LSE), jnp.zeros(query.shape[:3])
        (top_btn, sum_btn), _ = jax.lax.scan(look, start, jnp.arange(self.count(key.shape[1])))
        return jnp.swapaxes(top_btn - sum_btn / count_b.clip(1)[:, None, None], 1, 2)

    def attend_flops(self, length, context_length, dim, heads):
        few = self.count(length)
        return 2.0 * length * few * dim + 4.0 * few * length * dim
