# SPDX-License-Identifier: Apache-2.0
"""Dropout as a function of position, so that every implementation drops the same weights."""

import dataclasses

import jax
import jax.numpy as jnp

from attnjax.typing import Array, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part of a larger call lies in it, so that both drop the same weights.

    Attributes:
      heads: `[b,n]` uint32, `batch index * n + head index` in the larger call.
      queries: `[t]` uint32 positions.
      keys: `[s]` uint32 positions.
    """

    heads: Array
    queries: Array
    keys: Array


def whole_place(b: int, n: int, t: int, s: int) -> Place:
    """Return the place of a call that is not part of a larger one."""
    count = lambda size: jnp.arange(size, dtype=jnp.uint32)
    return Place(count(b * n).reshape(b, n), count(t), count(s))


def dropout_seed(key: PRNGKey) -> Array:
    """Reduce a key of any generator to the three words `[3]` uint32 that `dropout_factor` mixes."""
    return jax.random.bits(key, (3,), jnp.uint32)


def dropout_factor(seed: Array, rate: float, head: Array, query: Array, key: Array) -> Array:
    """Return 0 for a dropped weight and `1 / (1 - rate)` for a kept one.

    The decision is a keyed integer hash of the position, not a stream of random numbers: any tile
    of the weights can be computed alone, in any order, and comes out the same.

    Args:
      seed: `[3]` uint32 from `dropout_seed`.
      rate: probability of dropping, in (0, 1).
      head: uint32, `batch index * n + head index`.
      query: uint32 position of the query.
      key: uint32 position of the key; the three broadcast against one another.

    Returns:
      float32 of the broadcast shape.
    """
    bits = _mix(_mix(_mix(head ^ seed[0]) ^ query ^ seed[1]) ^ key ^ seed[2])
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(bits >= threshold, jnp.float32(1 / (1 - rate)), jnp.float32(0))


def _mix(word: Array) -> Array:
    # A bijection of 32-bit words in which every input bit moves every output bit (murmur3's last
    # step); without it, neighbouring positions would be dropped together.
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
