# SPDX-License-Identifier: Apache-2.0
"""Which example stands at which position of the endless training sequence, by random access.

Nothing here has state: the example at any position is computed from the seed, so a run continues
at any position at once and over any number of processes.
"""

import functools

import grain
import numpy as np

from attnjax.errors import RecipeError

KEPT_MULTIPLE = 256
"""With repeated augmentation an epoch keeps `N // 256 * 256` positions, as DeiT's sampler does."""

_SHUFFLE, _AUGMENT = 0, 1  # streams of randomness derived from one seed
_ROUNDS = 4
_MAX_SIZE = 2**32 - 1


def epoch_length(size: int, repeats: int) -> int:
    """Return the positions per epoch.

    Without repeats an epoch is one permutation of all `size` examples. With repeats it is the first
    `size // 256 * 256` entries of a permutation whose every entry is repeated in place, so only
    about `1 / repeats` of the examples occur in one epoch; sets smaller than 256 keep `size`.
    """
    if repeats == 1 or size < KEPT_MULTIPLE:
        return size
    return size // KEPT_MULTIPLE * KEPT_MULTIPLE


def global_rows(batch: int) -> np.ndarray:
    """Return the row order of a global batch: position offset of every row, int64 `[batch]`.

    Rows are the offsets in bit-reversed order (the odd factor of `batch` counts slowest in the
    sequence). Two things follow for every power-of-two number of processes or devices that
    divides `batch`: the contiguous block of rows of each is a strided shard of the sequence, so
    repeated copies of an example are spread over them; and the global array is the same whatever
    their number, so losses that pair or drop rows do not change when a run moves.

    >>> global_rows(8).tolist()
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    twos = (batch & -batch).bit_length() - 1
    offsets = np.arange(batch).reshape((batch >> twos,) + (2,) * twos)
    return offsets.transpose().ravel()


class Order:
    """The endless sequence of example indices of one training run.

    Args:
      size: examples in the source.
      seed: any integer; sequences of different seeds are unrelated.
      repeats: copies of an example that follow one another (repeated augmentation).
      shuffle: whether epochs are permuted, each differently.
    """

    def __init__(self, size: int, seed: int, repeats: int = 1, shuffle: bool = True):
        if not 1 <= size <= _MAX_SIZE:
            raise RecipeError(f"data.source has {size} examples: must be in [1, {_MAX_SIZE}]")
        self.size = size
        self.seed = seed % 2**64
        self.repeats = repeats
        self.shuffle = shuffle
        self.epoch_length = epoch_length(size, repeats)

    def __getitem__(self, position: int) -> int:
        """Return the example index at a position >= 0 of the sequence."""
        epoch, offset = divmod(int(position), self.epoch_length)
        entry = offset // self.repeats
        if not self.shuffle or self.size == 1:
            return entry
        return grain.experimental.index_shuffle(
            entry, max_index=self.size - 1, seed=_epoch_seed(self.seed, epoch), rounds=_ROUNDS
        )

    def generator(self, position: int) -> np.random.Generator:
        """Return a fresh generator for the augmentation at a position; copies differ."""
        return np.random.default_rng((_AUGMENT, self.seed, int(position)))


@functools.lru_cache(maxsize=64)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((_SHUFFLE, seed, epoch)).generate_state(1)[0])
