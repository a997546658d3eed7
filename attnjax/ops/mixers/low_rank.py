# SPDX-License-Identifier: Apache-2.0
"""Attention through few keys: learnt mixtures of positions (Linformer), landmarks (Nystrom).

    Linformer (Wang et al., arXiv 2006.04768):   M = softmax(Q (E K)^T / sqrt(h)) E
    Nystrom   (Xiong et al., arXiv 2102.03902):  M = F pinv(A) B

Q, K, V are [paper symbols]; E, F, A, B are those of the methods' papers, and that one E serves keys
and values is [our design].
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.mask import Mask
from attnjax.ops.mixers.template import Attention, check_length, check_positive, masked
from attnjax.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linformer(Attention):
    """Keys and values are mixed down to a fixed number by a learnt matrix E `[r,s]`.

    Attributes:
      rank: r, number of mixed keys.
    """

    is_exact: ClassVar[bool] = False

    rank: int = 64

    def __post_init__(self):
        check_positive(self, "rank")

    def own_params(self, key, length, dim, heads):
        draw = jax.random.normal(key, (self.rank, length), jnp.float32)
        return {"mixture": {"kernel": draw * length**-0.5}}

    def attend(self, params, query, key, value, valid):
        mixture_rs = self._mixture(params, key)
        few = [_mixed(mixture_rs, masked(x, valid)) for x in (key, value)]
        return attention(query, *few)

    def weights(self, params, query, key, valid):
        mixture_rs = self._mixture(params, key)
        few_brnh = _mixed(mixture_rs, masked(key, valid))
        found = attention(query, few_brnh, few_brnh, return_probabilities=True)
        weights_bnts = found.probabilities @ mixture_rs
        return weights_bnts if valid is None else weights_bnts * valid[:, None, None, :]

    def _mixture(self, params, key):
        mixture_rs = params["mixture"]["kernel"]
        check_length(key, mixture_rs.shape[1], self)
        return mixture_rs

    def mixing_flops(self, length, dim, heads):
        return 8.0 * length * self.rank * dim

    def mixing_numbers(self, length, dim, heads):
        return 2.0 * self.rank * dim + length * heads


def _mixed(mixture_rs, x_bsnh):
    return jnp.einsum("rs,bsnh->brnh", mixture_rs.astype(x_bsnh.dtype), x_bsnh)


def segment_means(x: Array, segments: int, valid: Array | None = None) -> Array:
    """Return the means of consecutive segments as even as can be, the shorter ones first.

    Args:
      x: `[b,t,n,h]`.
      segments: m, at most t.
      valid: bool `[b,t]`, False at padding: the valid tokens alone are divided. With fewer of them
        than segments, the last segments hold one token each and the first ones are zero.

    Returns:
      `[b,m,n,h]`.
    """
    if valid is None:
        valid = np.ones((1, x.shape[1]), bool)
    place_bt = valid.cumsum(axis=1) - 1
    count_b1 = valid.sum(axis=1, keepdims=True)
    size_b1 = count_b1 // segments
    short_b1 = (size_b1 + 1) * segments - count_b1
    late_bt = place_bt - short_b1 * size_b1  # places behind the shorter segments
    xp = np if isinstance(valid, np.ndarray) else jnp
    early_bt = place_bt // xp.maximum(size_b1, 1)
    owner_bt = xp.where(late_bt < 0, early_bt, short_b1 + late_bt // (size_b1 + 1))
    size_bt = size_b1 + (late_bt >= 0)
    is_owner_bmt = (owner_bt[:, None] == np.arange(segments)[:, None]) & valid[:, None]
    mean_bmt = jnp.asarray(is_owner_bmt / size_bt[:, None].clip(1), x.dtype)
    return jnp.einsum(
        "bmt,btnh->bmnh", jnp.broadcast_to(mean_bmt, (len(x), *mean_bmt.shape[1:])), x
    )


def pseudo_inverse(matrix: Array, iterations: int = 6, *, is_scale_shared: bool = False) -> Array:
    """Approximate the Moore-Penrose inverse of row-stochastic matrices by iteration.

    Z <- Z / 4 (13 I - A Z (15 I - A Z (7 I - A Z))),  Z_0 = A^T / max_j sum_i A_ij

    Args:
      matrix: A, `[...,m,m]` with rows that sum to 1.
      iterations: steps of third order.
      is_scale_shared: one scale for all matrices, as in the reference code, which makes a result
        depend on its neighbours in the batch.

    Returns:
      Z, `[...,m,m]`.
    """
    sums = matrix.sum(axis=-2).max(axis=-1)
    scale = sums.max() if is_scale_shared else sums[..., None, None]
    inverse = jnp.swapaxes(matrix, -1, -2) / scale
    eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse / 4 @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return inverse


def nystrom_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    landmarks: int,
    iterations: int = 6,
    scale: float | None = None,
    valid: Array | None = None,
    is_padding_divided: bool = False,
    is_scale_shared: bool = False,
) -> Array:
    """Attend to all keys through the means of segments: F pinv(A) (B V), linear in t and s.

    F = softmax(Q K~^T), A = softmax(Q~ K~^T), B = softmax(Q~ K^T), scores times the scale

    Args:
      query, key, value: `[b,t,n,h]`, of one length.
      landmarks: m; with no more (valid) tokens than that, softmax attention is computed exactly.
      iterations: see `pseudo_inverse`.
      scale: of the scores; `h ** -0.5` if None (the reference code has 1 / h).
      valid: bool `[b,t]`, False at padding, which then changes nothing.
      is_padding_divided: divide padding into segments, too, where its keys count as zero, as in the
        reference code: then it changes the result.
      is_scale_shared: see `pseudo_inverse`.

    Returns:
      `[b,t,n,h]` in the dtype of the query.
    """
    seen = None if valid is None else masks.array(valid[:, None, None, :])
    if query.shape[1] <= landmarks:
        return attention(query, key, value, mask=seen, scale=scale)
    divided = None if is_padding_divided else valid
    few_query = segment_means(masked(query, divided), landmarks, divided)
    few_key = segment_means(masked(key, valid), landmarks, divided)
    inner = attention(few_query, few_key, few_key, scale=scale, return_probabilities=True)
    inverse_bnmm = pseudo_inverse(inner.probabilities, iterations, is_scale_shared=is_scale_shared)
    gathered_bmnh = attention(few_query, key, value, mask=seen, scale=scale)
    gathered_bmnh = jnp.einsum("bnmr,brnh->bmnh", inverse_bnmm, gathered_bmnh.astype(jnp.float32))
    out_btnh = attention(query, few_key, gathered_bmnh.astype(query.dtype), scale=scale)
    if divided is None:
        return out_btnh
    # With so few valid tokens every segment is one token, or empty.
    few_value = segment_means(masked(value, valid), landmarks, valid)
    exact_btnh = attention(
        query, few_key, few_value, mask=filled_segments(valid, landmarks), scale=scale
    )
    is_few_b = valid.sum(axis=1) <= landmarks
    return jnp.where(is_few_b[:, None, None, None], exact_btnh, out_btnh)


def filled_segments(valid: Array, segments: int, copies: int = 1) -> Mask:
    """Show the segments of `segment_means` that hold a token.

    Args:
      valid: bool `[b,t]`.
      segments: m.
      copies: how often all segments follow each other.

    Returns:
      A mask of `[b,1,1,copies * m]`.
    """
    empty_b1 = segments - valid.sum(axis=1, keepdims=True)
    number = np.tile(np.arange(segments), copies)
    return masks.array((number >= empty_b1)[:, None, None, :])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom(Attention):
    """See `nystrom_attention`.

    Attributes:
      landmarks: m, segments of the sequence.
      iterations: of the pseudo-inverse.
    """

    is_exact: ClassVar[bool] = False

    landmarks: int = 16
    iterations: int = 6

    def __post_init__(self):
        check_positive(self, "landmarks", "iterations")

    def attend(self, params, query, key, value, valid):
        del params
        return nystrom_attention(
            query, key, value, landmarks=self.landmarks, iterations=self.iterations, valid=valid
        )

    def weights(self, params, query, key, valid):
        del params
        probabilities = lambda q, k, mask=None: (
            attention(q, k, k, mask=mask, return_probabilities=True).probabilities
        )
        seen = None if valid is None else masks.array(valid[:, None, None, :])
        if query.shape[1] <= self.landmarks:
            return probabilities(query, key, seen)
        few_query, few_key = (
            segment_means(masked(x, valid), self.landmarks, valid) for x in (query, key)
        )
        inverse = pseudo_inverse(probabilities(few_query, few_key), self.iterations)
        weights = probabilities(query, few_key) @ inverse @ probabilities(few_query, key, seen)
        if valid is None:
            return weights
        is_few_b = valid.sum(axis=1) <= self.landmarks
        return jnp.where(is_few_b[:, None, None, None], probabilities(query, key, seen), weights)

    def mixing_flops(self, length, dim, heads):
        m = self.landmarks
        inverse = 8.0 * self.iterations * heads * m**3
        return 8.0 * length * m * dim + 4.0 * m * m * dim + inverse

    def mixing_numbers(self, length, dim, heads):
        m = self.landmarks
        return 2.0 * length * heads + 3 * m * dim + 4 * self.iterations * heads * m * m
