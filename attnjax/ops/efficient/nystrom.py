# SPDX-License-Identifier: Apache-2.0
"""Nystromformer: softmax attention through the means of segments.

    F pinv(A) (B v) + conv(v),  F = softmax(q K~^T), A = softmax(Q~ K~^T), B = softmax(Q~ k^T)

Xiong et al., "Nystromformer", arXiv 2102.03902, Eq. 13 and Section 3.3: Q~ and K~ are means of m
segments of the tokens, the pseudo-inverse comes from six steps of an iteration, and an optional
convolution over the positions of every head carries values past the bottleneck.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.attention import attention
from attnjax.ops.efficient.template import PatternAttention
from attnjax.ops.mixers.convolution import convolve
from attnjax.ops.mixers.low_rank import nystrom_attention
from attnjax.ops.mixers.template import check_positive, masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom(PatternAttention):
    """See `nystrom_attention`.

    Attributes:
      landmarks: m, segments of the valid tokens; with no more tokens than that it is softmax
        attention.
      kernel: width of the convolution over positions, odd; 0: there is none.
      iterations: of the pseudo-inverse.
      compat: as released: scores divided by h instead of sqrt(h), segments of padding, too, and one
        scale of the pseudo-inverse for the whole batch, which makes examples depend on others.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"noncausal_self"})

    landmarks: int = 16
    kernel: int = 0
    iterations: int = 6
    compat: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "landmarks", "iterations")
        if (self.kernel and self.kernel % 2 == 0) or self.kernel < 0:
            raise ValueError(f"kernel={self.kernel}: must be odd, or 0 for no convolution")

    def own_params(self, key, dim, heads):
        if not self.kernel:
            return {}
        bound = self.kernel**-0.5  # as PyTorch draws a convolution's kernel
        shape = (heads, self.kernel)
        return {"filter": jax.random.uniform(key, shape, jnp.float32, -bound, bound)}

    def attend(
        self, params, query, key, value, *,
        query_valid=None, key_valid=None, rng=None, train=False, core=attention,
    ):  # fmt: skip
        del query_valid, rng, train, core
        out = nystrom_attention(
            query, key, value, landmarks=self.landmarks, iterations=self.iterations,
            scale=1 / query.shape[-1] if self.compat else None, valid=key_valid,
            is_padding_divided=self.compat, is_scale_shared=self.compat,
        )  # fmt: skip
        if self.kernel:
            passed = convolve(masked(value, key_valid), params["filter"], first=-(self.kernel // 2))
            out = out + passed
        return out

    def attend_flops(self, length, context_length, dim, heads):
        m = self.landmarks
        if length <= m:
            return 4.0 * length * length * dim + 2.0 * length * self.kernel * dim
        inverse = 8.0 * self.iterations * heads * m**3
        means = 4.0 * m * length * dim
        # Scores and sums of A, whose values are not used, among them.
        return means + 8.0 * length * m * dim + 6.0 * m * m * dim + inverse
