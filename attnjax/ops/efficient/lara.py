# SPDX-License-Identifier: Apache-2.0
"""LARA: linear-complexity randomised attention, importance sampling from a few proposals.

With x' = x . w / sqrt(h) - |x|^2 / (2 sqrt(h)) =: lp(x, w), landmarks mu_c = q~_c + k~_c (sums of
the means of segments c) and samples w_c ~ N(mu_c, 1):

    kv_c  = sum_j softmax_j(lp(k_j, w_c)) v_j
    out_i = sum_c softmax_c(mu_c . q_i / sqrt(h) + lp(q_i, w_c)
                            + logsumexp_j lp(k_j, w_c) - lp(mu_c, w_c)) kv_c

Zheng et al., "Linear Complexity Randomized Self-attention Mechanism", arXiv 2204.04667, Eq. 16 and
17. |q_i|^2 does not depend on c, so both lines are softmax attention with a bias for each key, and
run on the core. The released option `use_opt_approx` adds log |v_i| to the logits of all c alike,
which cancels: there is nothing to offer.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PatternAttention
from attnjax.ops.mixers.low_rank import filled_segments, segment_means
from attnjax.ops.mixers.template import check_positive, masked, without_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lara(PatternAttention):
    """Attend through samples around the means of segments.

    Without `train` and a key the samples are their means.

    Attributes:
      landmarks: c, segments of the valid tokens; as many as tokens, if there are fewer.
      is_antithetic: each landmark gives two samples while training, on opposite sides of its mean.
      is_adaptive: the means of segments pass through learnt linear maps, which heads share.
      compat: as released: padding is divided into segments and counts in the log-sum-exp over keys.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"noncausal_self"})
    is_random: ClassVar[bool] = True

    landmarks: int = 16
    is_antithetic: bool = False
    is_adaptive: bool = False
    compat: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "landmarks")

    def own_params(self, key, dim, heads):
        if not self.is_adaptive:
            return {}
        h = dim // heads
        draw = lambda k: jax.random.uniform(k, (h, h), jnp.float32, -(h**-0.5), h**-0.5)
        return {
            name: {"kernel": draw(k), "bias": jnp.zeros(h)}
            for name, k in zip(("query_mean", "key_mean"), jax.random.split(key), strict=True)
        }

    def attend(
        self, params, query, key, value, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        del query_valid, core
        t, h = query.shape[1], query.shape[3]
        count, seen = min(self.landmarks, t), masks.full()
        divided = None if self.compat else key_valid
        if divided is not None:
            seen = filled_segments(divided, count)
        mean_bcnh = self._mean(params, "query_mean", query, count, divided)
        mean_bcnh += self._mean(params, "key_mean", key, count, divided)
        sample_bcnh = mean_bcnh
        if train and rng is not None:
            noise_bcnh = jax.random.normal(rng, mean_bcnh.shape, jnp.float32)
            if self.is_antithetic:
                noise_bcnh = jnp.concatenate([noise_bcnh, -noise_bcnh], axis=1)
                mean_bcnh = jnp.concatenate([mean_bcnh, mean_bcnh], axis=1)
                seen = seen if divided is None else filled_segments(divided, count, copies=2)
            sample_bcnh = mean_bcnh + noise_bcnh
        dtype = query.dtype
        near = without_padding(masks.full(), key_valid)
        norm_bn1s = -_halved(key)[:, :, None]
        gathered = attention(
            sample_bcnh.astype(dtype), key, value, mask=near, bias=norm_bn1s, return_lse=True
        )
        lse_bnc = gathered.lse
        if self.compat and key_valid is not None:
            lse_bnc = attention(
                sample_bcnh.astype(dtype), key, value, bias=norm_bn1s, return_lse=True
            ).lse
        own_bnc = jnp.einsum("bcnh,bcnh->bnc", mean_bcnh, sample_bcnh) * h**-0.5
        bias_bnc = lse_bnc - own_bnc + _halved(mean_bcnh)
        reader_bcnh = (mean_bcnh + sample_bcnh).astype(dtype)
        return attention(query, reader_bcnh, gathered.out, mask=seen, bias=bias_bnc[:, :, None])

    def _mean(self, params, name, x_btnh, count, valid):
        mean_bcnh = segment_means(masked(x_btnh, valid), count, valid).astype(jnp.float32)
        if not self.is_adaptive:
            return mean_bcnh
        kernel, bias = (params[name][part].astype(jnp.float32) for part in ("kernel", "bias"))
        return mean_bcnh @ kernel + bias

    def attend_flops(self, length, context_length, dim, heads):
        c = min(self.landmarks, length)
        adaptive = 4.0 * c * dim * (dim // heads) if self.is_adaptive else 0
        return 4.0 * c * length * dim + 8.0 * c * length * dim + 2.0 * c * dim + adaptive


def _halved(x_btnh):
    """Return |x|^2 / (2 sqrt(h)) `[b,n,t]` float32."""
    x_btnh = x_btnh.astype(jnp.float32)
    return jnp.swapaxes(jnp.sum(x_btnh * x_btnh, axis=-1), 1, 2) * (0.5 * x_btnh.shape[-1] ** -0.5)
