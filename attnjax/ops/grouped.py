# SPDX-License-Identifier: Apache-2.0
"""Softmax in groups: landmarks gate their blocks, with all weights in one matrix.

Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300, Section 3.1. A block is a run of keys
up to and including a landmark. Of a query in block o, with scores z:

    main      = softmax of z over the normal keys of o and the landmarks of other blocks
    inner_b   = softmax of z over the normal keys of another block b
    weight_k  = 0 for landmarks, main_k for k in o, inner_b,k * main_landmark(b) for k in b

With a context-miss token of score z_0 (their release, `landmark_with_cmt`) the main softmax is
over z_0, too, and the gates of some landmarks, the controlled ones, are a softmax among themselves,
times the share of z_0: looking into their blocks is one choice, which one is another.

`attnjax.ops.landmark` computes the same block by block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.dropout import dropout_factor, dropout_seed
from attnjax.ops.normalizer import EMPTY_LSE, Rowwise, register, softmax
from attnjax.typing import Array, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextMiss:
    """The token that says that the context at hand is not enough, and what it decides on.

    Attributes:
      score: `[b,n,t]`, the token's scaled score for every query.
      controlled: bool `[b|1, s]`, keys; only landmarks of earlier blocks count.
      cutoff: a share of the token below this counts as 0: no controlled block is looked into.
    """

    score: Array
    controlled: Array
    cutoff: float = dataclasses.field(default=0.0, metadata={"static": True})

    def gates(self, main: Array, controlled: Array, score: Array) -> Array:
        """Return the gates `[b,n,t,x]` of own keys and landmarks alike.

        Args:
          main: scores `[b,n,t,x]` of what competes with the token, -inf elsewhere.
          controlled: scores of the controlled landmarks, likewise.
          score: the token's score `[b,n,t]`.
        """
        together, _ = softmax(jnp.concatenate([main, score[..., None]], axis=-1))
        share = self.cut(together[..., -1])[..., None]
        return together[..., :-1] + share * softmax(controlled)[0]

    def cut(self, share: Array) -> Array:
        """Return the shares of the token that count."""
        return jnp.where(share < self.cutoff, 0, share)


@register(("is_landmark", "dropout_key", "miss"))
class Grouped(Rowwise):
    """Softmax in groups; queries are the last t of the s keys. Add a causal mask yourself.

    Keys without a landmark behind them form a block that only its own queries see. Where a query
    sees a landmark but no normal key of its block, the landmark's share of the weight is lost.

    Attributes:
      is_landmark: bool `[b|1, s]`.
      dropout_rate: probability that a query's gate to another block is dropped (in training).
      dropout_key: typed key, needed when the rate is not 0.
      miss: the context-miss token; None: there is none.
    """

    is_landmark: Any
    dropout_rate: float = 0.0
    dropout_key: PRNGKey | None = None
    miss: ContextMiss | None = None

    def check(self, n, h, hv):
        shape, dtype = jnp.shape(self.is_landmark), jnp.result_type(self.is_landmark)
        if len(shape) != 2 or dtype != jnp.bool_:
            raise ValueError(f"is_landmark must be bool [b,s], got {dtype} {shape}")
        check_group_dropout(self.dropout_rate, self.dropout_key)

    def weights(self, scores):
        b, _, t, s = scores.shape
        is_landmark = self.is_landmark
        if is_landmark.shape not in ((1, s), (b, s)) or t > s:
            raise ValueError(
                f"is_landmark of shape {is_landmark.shape} does not fit {t} queries of {s} keys in "
                f"{b} examples: it needs [{b} or 1, {s}], and no more queries than keys"
            )
        groups = s
        if isinstance(is_landmark, np.ndarray):
            block = _regular_block(is_landmark)
            if block:
                return self._regular_weights(scores, block)
            groups = 1 + int(is_landmark.sum(axis=-1).max())
        is_landmark = jnp.asarray(is_landmark)
        count = jnp.cumsum(is_landmark, axis=-1, dtype=jnp.int32)
        block_bs = count - is_landmark
        own = (block_bs[:, s - t :, None] == block_bs[:, None, :])[:, None]
        landmark = is_landmark[:, None, None, :]
        if self.miss is None:
            main, _ = softmax(scores, where=own ^ landmark)
        else:
            far = ~own & landmark & self.miss.controlled[:, None, None, :]
            only = lambda where: jnp.where(where, scores, -jnp.inf)
            main = self.miss.gates(only((own ^ landmark) & ~far), only(far), self.miss.score)
        inner = _softmax_by_group(
            jnp.where(own | landmark, -jnp.inf, scores),
            jnp.broadcast_to(block_bs, (b, s)),
            groups,
        )
        # The landmark behind every key; s where there is none.
        behind_bs = jax.lax.cummin(
            jnp.where(is_landmark, jnp.arange(s, dtype=jnp.int32), s), axis=1, reverse=True
        )
        behind = behind_bs[:, None, None, :]
        gate = jnp.take_along_axis(
            main, jnp.broadcast_to(jnp.minimum(behind, s - 1), scores.shape), axis=-1
        )
        gate = jnp.where(behind < s, gate, 0)
        if self.dropout_rate:
            gate = gate * self._dropout(gate, behind)
        return jnp.where(landmark, 0, jnp.where(own, main, inner * gate))

    def _regular_weights(self, scores, block):
        # Every block is a row of its own here, which is several times faster than segments.
        b, n, t, s = scores.shape
        count = -(-s // block)
        widths = ((0, 0),) * 3 + ((0, count * block - s),)
        scores = jnp.pad(scores, widths, constant_values=-jnp.inf).reshape(b, n, t, count, block)
        own = ((np.arange(t) + s - t) // block)[:, None] == np.arange(count)
        # Large scores would round the log-sum-exp; only their differences matter.
        logits = jnp.where(own, scores[..., :-1].max(axis=-1), scores[..., -1])
        top = jnp.maximum(logits.max(axis=-1), EMPTY_LSE)[..., None, None]
        top = jax.lax.stop_gradient(top)
        scores = scores - top
        inner, lse = softmax(scores[..., :-1])
        logits = jnp.where(own, lse, scores[..., -1])
        if self.miss is None:
            gate, _ = softmax(logits)
        else:
            far = ~own & by_block(self.miss.controlled, block, count)[:, None, None]
            only = lambda where: jnp.where(where, logits, -jnp.inf)
            gate = self.miss.gates(only(~far), only(far), self.miss.score - top[..., 0, 0])
        if self.dropout_rate:
            behind = jnp.arange(block - 1, count * block, block)[None, None, None]
            gate = gate * jnp.where(own, 1, self._dropout(gate, behind))
        weights = jnp.pad(inner * gate[..., None], ((0, 0),) * 4 + ((0, 1),))
        return weights.reshape(b, n, t, count * block)[..., :s]

    def _dropout(self, gate, landmark):
        """Return the factors of `gate [b,n,t,...]`, whose last axis has these landmarks' places."""
        b, n, t = gate.shape[:3]
        head = jnp.arange(b * n, dtype=jnp.uint32).reshape(b, n, 1, 1)
        query = jnp.arange(t, dtype=jnp.uint32).reshape(1, 1, t, 1)
        seed = dropout_seed(self.dropout_key)
        factor = dropout_factor(seed, self.dropout_rate, head, query, landmark.astype(jnp.uint32))
        return factor.astype(gate.dtype)


def _regular_block(is_landmark: np.ndarray) -> int:
    """Return the keys of a block where all end alike, and 0 elsewhere."""
    row_s = is_landmark[0]
    block = int(row_s.argmax()) + 1
    regular_s = np.arange(row_s.size) % block == block - 1
    return block if block > 1 and bool(np.all(is_landmark == regular_s)) else 0


def by_block(controlled: Array, block: int, count: int) -> Array:
    """Return bool `[b|1, count]`, whether the landmark of each block is among `controlled [.., s]`.

    Args:
      controlled: bool `[b|1, s]`.
      block: keys of a block.
      count: blocks, of which the last may lack its landmark.
    """
    missing = count * block - controlled.shape[1]
    return jnp.pad(jnp.asarray(controlled), ((0, 0), (0, missing)))[:, block - 1 :: block]


def check_group_dropout(rate: float, key: PRNGKey | None) -> None:
    """Raise ValueError unless the rate is in [0, 1) and comes with a key if it is not 0."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"the rate of group dropout must be in [0, 1), got {rate}")
    if rate and key is None:
        raise ValueError(f"group dropout of rate {rate} needs a key")


def _softmax_by_group(scores_bnts: Array, group_bs: Array, groups: int) -> Array:
    """Normalise within groups of keys numbered from 0; groups of nothing but -inf become zero."""

    def one(scores_nts, group_s):
        scores_snt = jnp.moveaxis(scores_nts, -1, 0)
        total_of = lambda x, reduce: reduce(x, group_s, groups, indices_are_sorted=True)[group_s]
        top = jnp.maximum(total_of(scores_snt, jax.ops.segment_max), EMPTY_LSE)
        exponential = jnp.exp(scores_snt - jax.lax.stop_gradient(top))
        total = total_of(exponential, jax.ops.segment_sum)
        return jnp.moveaxis(exponential / jnp.where(total == 0, 1, total), 0, -1)

    return jax.vmap(one)(scores_bnts, group_bs)
