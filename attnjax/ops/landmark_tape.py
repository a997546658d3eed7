# SPDX-License-Identifier: Apache-2.0
"""Where landmarks stand on a tape, and the positions of blocks that come back from a cache.

A block is l normal tokens and a landmark behind them, l + 1 slots of the tape. Mohtashami and
Jaggi, "Landmark Attention", arXiv 2305.16300, Section 3.2: the context that a query sees has a
prefix of k + 1 blocks. The latest k cached blocks stand at their true places in it; all older ones
are compared as if they stood in the first.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array, PRNGKey


def token_slots(count: int, every: int, phase: int = 0) -> np.ndarray:
    """Return the slot of each of `count` tokens on a tape with a landmark after every `every`.

    Args:
      count: number of tokens.
      every: l, at least 1.
      phase: tokens of an incomplete block in front of the first one, below l.

    Returns:
      int `[count]`; slot 0 is the first token's.

    Raises:
      ValueError: an argument is out of range.
    """
    if every < 1 or not 0 <= phase < every or count < 0:
        raise ValueError(f"count={count}, every={every}, phase={phase}: need 0 <= phase < every")
    token = np.arange(count)
    return token + (phase + token) // every


def tape_length(count: int, every: int, phase: int = 0) -> int:
    """Return the slots of `count` tokens with the landmarks of all blocks that they complete."""
    token_slots(0, every, phase)
    return count + (phase + count) // every


def insert(tokens: Array, every: int, landmark: int, phase: int = 0) -> Array:
    """Put a landmark behind every block of tokens.

    Args:
      tokens: `[b, t]` of any dtype.
      every: l, tokens of a block.
      landmark: what to put there.
      phase: see `token_slots`.

    Returns:
      `[b, tape_length(t)]`, in the array library of the tokens.
    """
    count = tokens.shape[1]
    slots = token_slots(count, every, phase)
    # Gathered, so that arrays of both libraries do: behind the last token stands a landmark.
    source = np.full(tape_length(count, every, phase), count)
    source[slots] = np.arange(count)
    is_landmark = source == count
    taken = tokens[:, np.where(is_landmark, 0, source)]
    if isinstance(taken, np.ndarray):
        return np.where(is_landmark, np.asarray(landmark, taken.dtype), taken)
    return jnp.where(is_landmark, jnp.asarray(landmark, taken.dtype), taken)


def strip(tape: Array, every: int, phase: int = 0) -> Array:
    """Return what `insert` was given: `[b, m, ...]` without the slots of landmarks.

    Args:
      tape: `[b, m, ...]`.
      every, phase: as in `insert`.
    """
    return tape[:, normal_slots(tape.shape[1], every, phase)]


def normal_slots(length: int, every: int, phase: int = 0) -> np.ndarray:
    """Return the slots of a tape of this length that are no landmarks, rising."""
    token_slots(0, every, phase)
    slot = np.arange(length)
    return slot[(slot + phase) % (every + 1) != every]


def chunk_start(cached: int | Array, top_k: int, block: int) -> int | Array:
    """Return the position of the first slot behind the cached blocks: min(cached, k + 1) blocks.

    Args:
      cached: number of blocks in the cache.
      top_k: k, blocks that a query retrieves.
      block: l + 1, slots of a block.
    """
    return _minimum(cached, top_k + 1) * block


def cached_slots(age: Array, cached: int | Array, top_k: int) -> Array:
    """Return the slot in the prefix, counted in blocks, at which a cached block is compared.

    Args:
      age: int, 0 for the latest block, 1 for the one before, and so on.
      cached: number of blocks in the cache.
      top_k: k.

    Returns:
      int of the shape of age: true places for the latest k + 1, 0 for all others.
    """
    return _maximum(_minimum(cached, top_k + 1) - 1 - age, 0)


def retrieved_slots(age: Array, cached: int | Array, top_k: int) -> Array:
    """Return the slots in the prefix, counted in blocks, into which retrieved blocks are laid.

    Old blocks fill the slots from the first one on, so that they stand apart; the latest k stay
    where they are, and a slot between both may be left empty.

    Args:
      age: int `[..., k]`, falling: the oldest block first.
      cached: number of blocks in the cache.
      top_k: k.

    Returns:
      int of the shape of age.
    """
    rank = np.arange(age.shape[-1])
    is_recent = age < top_k
    true = cached_slots(age, cached, top_k)
    return _numpy(age).where(is_recent, true, rank)


def jump(key: PRNGKey, shape: tuple[int, int], every: int, most: int = 100) -> Array:
    """Draw training positions that skip 1 to `most` places behind every landmark (Appendix E).

    Args:
      key: typed key.
      shape: (b, m), examples and slots of tapes that begin with a block.
      every: l.
      most: longest jump.

    Returns:
      int32 `[b, m]`.

    Raises:
      ValueError: no jump is allowed.
    """
    if most < 1:
        raise ValueError(f"most={most}: must be at least 1")
    (b, m), slot = shape, np.arange(shape[1])
    jumps = jax.random.randint(key, (b, m // (every + 1) + 1), 1, most + 1)
    before = jnp.concatenate([jnp.zeros((b, 1), jnp.int32), jnp.cumsum(jumps, axis=1)], axis=1)
    return slot.astype(np.int32) + before[:, slot // (every + 1)]


def _minimum(a, b):
    return min(a, b) if isinstance(a, int) else _numpy(a).minimum(a, b)


def _maximum(a, b):
    return _numpy(a).maximum(a, b)


def _numpy(array):
    return np if isinstance(array, np.ndarray | np.integer | int) else jnp
