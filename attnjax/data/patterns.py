# SPDX-License-Identifier: Apache-2.0
"""Sequences that need one pattern of attention and whose answer is known.

CAB (arXiv 2210.07661) names four patterns. `WindowPermutation` is for noncausal self-attention,
`AssociativeRecall` for causal; cross-attention has `pairs.CopySort` (causal), and
`series.SeasonalSeries` and `series.LaggedSeries`. The tasks are our design. Token 0 is padding
everywhere.
"""

import numpy as np

from attnjax.data.synthetic import stream
from attnjax.errors import RecipeError


class WindowPermutation:
    """Every position repeats the token that stands exactly `distance` before or behind it.

    Positions pair up: i with i + distance. So attention to w neighbours on either side can be right
    everywhere where w >= distance, and knows nothing where w < distance, unless layers pass it on.
    Examples have `tokens`, `target` int32 and `scored` bool, `[length]`.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: tokens, a multiple of twice the distance.
      distance: between the two of a pair.
      symbols: how many there are; their tokens begin at 1.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        length: int = 64,
        distance: int = 8,
        symbols: int = 8,
    ):
        if distance < 1 or length < 1 or length % (2 * distance):
            raise RecipeError(
                f"source.length={length}: must be a multiple of twice distance={distance}"
            )
        if symbols < 2:
            raise RecipeError(f"source.symbols={symbols}: must be at least 2")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._length, self._symbols = length, symbols
        place = np.arange(length)
        is_first = place % (2 * distance) < distance
        self.permutation = np.where(is_first, place + distance, place - distance)
        self.vocab_size = symbols + 1

    @property
    def chance(self) -> float:
        """Accuracy of who sees the wrong tokens."""
        return 1 / self._symbols

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        tokens = rng.integers(1, self._symbols + 1, self._length).astype(np.int32)
        return {
            "tokens": tokens,
            "target": tokens[self.permutation],
            "scored": np.ones(self._length, bool),
        }


class AssociativeRecall:
    """Pairs of a key and a value, fillers, then every key with a value to be recalled behind it.

    A pair is one token. Between the last pair and the first question stand `distance` fillers, so
    that a model whose layers together see fewer tokens knows nothing. Examples have `tokens` int32
    and `scored` bool, `[length]`: the recalled values are to be predicted.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      keys: number of keys; each has one pair and one question, in orders of their own.
      values: number of values.
      distance: fillers.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        keys: int = 4,
        values: int = 4,
        distance: int = 32,
    ):
        for name, value, least in (
            ("keys", keys, 1),
            ("values", values, 2),
            ("distance", distance, 0),
        ):
            if value < least:
                raise RecipeError(f"source.{name}={value}: must be at least {least}")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._keys, self._values, self._distance = keys, values, distance
        self.length = 3 * keys + distance
        self.vocab_size = 2 + keys + values + keys * values

    @property
    def chance(self) -> float:
        """Accuracy of who does not see the pairs."""
        return 1 / self._values

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        k, v = self._keys, self._values
        filler, first_key, first_value, first_pair = 1, 2, 2 + k, 2 + k + v
        held = rng.integers(v, size=k)
        told, asked = rng.permutation(k), rng.permutation(k)
        questions = np.stack([first_key + asked, first_value + held[asked]], axis=1).ravel()
        tokens = np.concatenate(
            [first_pair + told * v + held[told], np.full(self._distance, filler), questions]
        )
        scored = np.zeros(self.length, bool)
        scored[k + self._distance + 1 :: 2] = True
        return {"tokens": tokens.astype(np.int32), "scored": scored}
