# SPDX-License-Identifier: Apache-2.0
"""Attention inside hash buckets: softmax over the tokens that point the same way.

Kitaev et al., "Reformer", arXiv 2001.04451, one round. Queries are keys (shared W^q); a token's
bucket is the direction, among random ones and their opposites, that it is closest to. Tokens are
sorted by bucket and cut into chunks; each sees those of its bucket in its own chunk and the one
before. [our design]: a token sees itself, and there is no causal form, because where chunks end
depends on later tokens.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.attention import attention
from attnjax.ops.mixers import chunks
from attnjax.ops.mixers.template import Attention, check_positive, project
from attnjax.ops.positions import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashBuckets(Attention):
    """Softmax inside sorted buckets, in time t log t.

    Attributes:
      chunk: tokens of a chunk.
      buckets: even number of buckets; 0: two for each chunk of the length at `init`.
    """

    is_exact: ClassVar[bool] = False
    projections: ClassVar[tuple[str, ...]] = ("query", "value", "out")

    chunk: int = 32
    buckets: int = 0

    def __post_init__(self):
        check_positive(self, "chunk")
        if self.buckets < 0 or self.buckets % 2:
            raise ValueError(f"buckets={self.buckets}: must be even, or 0 for a rule")

    def own_params(self, key, length, dim, heads):
        half = self.buckets // 2 or max(1, -(-length // self.chunk))
        return {"random_projection": jax.random.normal(key, (heads, dim // heads, half))}

    def queries_keys(self, params, x):
        query_btnh = project(params, "query", x)
        if self.rotary:
            query_btnh = rotate(query_btnh, jnp.arange(x.shape[1]))
        wide = query_btnh.astype(jnp.float32)
        norm_btn1 = jnp.sqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-12)
        return query_btnh, (wide / norm_btn1).astype(x.dtype)

    def bucket_of(self, params, key, valid):
        """Return the bucket of every token and head, int32 `[b,n,t]`; padding has one of its own.

        Args:
          params: from `init`.
          key: `[b,t,n,h]`.
          valid: bool `[b,t]` or None.
        """
        directions_nhr = jax.lax.stop_gradient(params["random_projection"])
        along_bntr = jnp.einsum("btnh,nhr->bntr", key.astype(jnp.float32), directions_nhr)
        both_bntr = jnp.concatenate([along_bntr, -along_bntr], axis=-1)
        bucket_bnt = jnp.argmax(both_bntr, axis=-1).astype(jnp.int32)
        if valid is None:
            return bucket_bnt
        return jnp.where(valid[:, None, :], bucket_bnt, both_bntr.shape[-1])

    def attend(self, params, query, key, value, valid):
        b, t, n, h = query.shape
        size = min(self.chunk, t)
        bucket_bnt = self.bucket_of(params, key, valid)
        order_bnt = jnp.argsort(bucket_bnt, axis=-1, stable=True)

        def sort(x_btnh):
            # Heads sort differently, so that each is an example of its own: [b * n, t, 1, h].
            x_bnth = jnp.moveaxis(x_btnh, 1, 2)
            x_bnth = jnp.take_along_axis(x_bnth, order_bnt[..., None], axis=2)
            return x_bnth.reshape(b * n, t, 1, h)

        sorted_bt = jnp.take_along_axis(bucket_bnt, order_bnt, axis=2).reshape(b * n, t)
        # Buckets count from 1 here: what pads the chunks has bucket 0.
        own = chunks.split(sorted_bt + 1, size)
        near = chunks.with_previous(own)
        is_same = (own[..., :, None] == near[..., None, :]) & (near[..., None, :] > 0)
        mixed = attention(
            chunks.fold(chunks.split(sort(query), size)),
            *(chunks.fold(chunks.with_previous(chunks.split(sort(x), size))) for x in (key, value)),
            mask=masks.array(chunks.fold(is_same)[:, None]),
        )
        mixed_bnth = chunks.join(mixed, b * n, t).reshape(b, n, t, h)
        back_bnt = jnp.argsort(order_bnt, axis=-1)
        return jnp.moveaxis(jnp.take_along_axis(mixed_bnth, back_bnt[..., None], axis=2), 2, 1)

    def weights(self, params, query, key, valid):
        bucket_bnt = self.bucket_of(params, key, valid)
        order_bnt = jnp.argsort(bucket_bnt, axis=-1, stable=True)
        chunk_bnt = jnp.argsort(order_bnt, axis=-1) // min(self.chunk, query.shape[1])
        distance_bnts = chunk_bnt[..., :, None] - chunk_bnt[..., None, :]
        seen_bnts = bucket_bnt[..., :, None] == bucket_bnt[..., None, :]
        seen_bnts &= (distance_bnts == 0) | (distance_bnts == 1)
        mask = masks.array(seen_bnts)
        return attention(query, key, key, mask=mask, return_probabilities=True).probabilities

    def mixing_flops(self, length, dim, heads):
        half = self.buckets // 2 or max(1, -(-length // self.chunk))
        return 2.0 * length * dim * half + 8.0 * length * self.chunk * dim

    def mixing_numbers(self, length, dim, heads):
        return 5.0 * length * dim + 3 * length * heads

    def path_length(self, length):
        return 1 if length <= 1 else None
