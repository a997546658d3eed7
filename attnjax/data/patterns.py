# SPDX-License-Identifier: Apache-2.0
"""Sequences that need one pattern of attention and whose answer is known.

CAB (arXiv 2210.07661) names four patterns. `WindowPermutation` is for noncausal self-attention,
`AssociativeRecall` for causal; cross-attention has `pairs.CopySort` (causal), and
`series.SeasonalSeries` and `series.LaggedSeries`. `CopyBack`, `Induction` and `PrefixCount` tell
apart what causal mixers of "Deconstructing Attention" (arXiv 2510.11602) can do: look back by a
number of places, look for a token, count. The tasks are our design. Token 0 is padding everywhere.
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
        _check_least(symbols=(symbols, 2))
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
        _check_least(
            keys=(keys, 1),
            values=(values, 2),
            distance=(distance, 0),
        )
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


class CopyBack:
    """Random tokens, then again and again the token `distance` places before.

    A map of attention that depends on the places alone can be right everywhere; who sees one token
    at a time knows nothing. Examples have `tokens` int32 and `scored` bool, `[length]`.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: tokens, more than the distance.
      distance: of a token from the one that it repeats.
      symbols: how many there are; their tokens begin at 1.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        length: int = 32,
        distance: int = 8,
        symbols: int = 16,
    ):
        if not 1 <= distance < length:
            raise RecipeError(f"source.distance={distance}: must be below length={length}")
        _check_least(symbols=(symbols, 2))
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._distance, self._symbols, self.length = distance, symbols, length
        self.vocab_size = symbols + 1

    @property
    def chance(self) -> float:
        """Accuracy of who does not see the token."""
        return 1 / self._symbols

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        first = rng.integers(1, self._symbols + 1, self._distance)
        place = np.arange(self.length)
        tokens = first[place % self._distance].astype(np.int32)
        return {"tokens": tokens, "scored": place >= self._distance}


class Induction:
    """Random pairs of two tokens, then first ones drawn among them again, each to be completed.

    The second token of a pair stands behind its first one, so that a model has to look one place
    back and then for a token: with a map of attention that no token changes it cannot. What it can
    know is which tokens are second ones, but not of which: it is right once in `pairs`. Behind a
    pair its first token is told again. Examples have `tokens` int32 and `scored` bool, `[length]`:
    completions are to be predicted.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      pairs: of an example.
      asks: completions, any pair as often as chance has it.
      firsts: how many first tokens there are; those of an example differ.
      seconds: how many second tokens there are; those of an example differ.
      echoes: the first tokens that are told again are to be predicted, too. They teach to look one
        place back, without which training may take many times as long.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        pairs: int = 4,
        asks: int = 12,
        firsts: int = 8,
        seconds: int = 8,
        echoes: bool = False,
    ):
        _check_least(
            pairs=(pairs, 2),
            asks=(asks, 1),
            firsts=(firsts, pairs),
            seconds=(seconds, pairs),
        )
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._pairs, self._asks, self._firsts, self._seconds = pairs, asks, firsts, seconds
        self._echoes = echoes
        self.length = 3 * pairs + 2 * asks
        self.vocab_size = 1 + firsts + seconds

    @property
    def chance(self) -> float:
        """Accuracy of who knows the second tokens, but not which belongs to which first one."""
        return 1 / self._pairs

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        first = 1 + rng.permutation(self._firsts)[: self._pairs]
        second = 1 + self._firsts + rng.permutation(self._seconds)[: self._pairs]
        told = np.stack([first, second, first], axis=1)
        asked = told[rng.integers(self._pairs, size=self._asks), :2]
        scored = np.zeros(self.length, bool)
        scored[3 * self._pairs + 1 :: 2] = True
        if self._echoes:
            scored[2 : 3 * self._pairs : 3] = True
        tokens = np.concatenate([told.ravel(), asked.ravel()])
        return {"tokens": tokens.astype(np.int32), "scored": scored}


class PrefixCount:
    """Fair bits, and behind every block of them whether most bits so far were ones.

    The mean over all bits so far tells everything, its order nothing. Tokens 1 and 2 are the bits
    zero and one, 3 asks, 4 says no (and that there are as many), 5 yes. Examples have `tokens`
    int32 and `scored` bool, `[length]`: answers are to be predicted.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      blocks: questions.
      bits: of a block.
    """

    vocab_size = 6

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        blocks: int = 4,
        bits: int = 7,
    ):
        _check_least(blocks=(blocks, 1), bits=(bits, 1))
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._blocks, self._bits = blocks, bits
        self.length = blocks * (bits + 2)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        bits = rng.integers(2, size=(self._blocks, self._bits))
        ones = np.cumsum(bits.sum(axis=1))
        is_most = 2 * ones > self._bits * np.arange(1, self._blocks + 1)
        asked = np.full(self._blocks, 3)
        tokens = np.concatenate([1 + bits, np.stack([asked, 4 + is_most], axis=1)], axis=1)
        scored = np.zeros(tokens.shape, bool)
        scored[:, -1] = True
        return {"tokens": tokens.ravel().astype(np.int32), "scored": scored.ravel()}


class KeyRecall:
    """Blocks of fillers, one of which holds a key; behind them the question for it.

        ... f f KEY v1 v2 f f f ... ASK KEY v1 v2

    The landmark of a block must tell that the key is in it, and attention must find it there, among
    as many blocks as there are. Fillers and values are drawn, as is the place. Examples have
    `tokens` int32 and `scored` bool, `[block * blocks + 4]`: v1 and v2 are to be predicted behind
    the question; and `holder` int32, the block that holds them, -1 at all other tokens.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      blocks: D, blocks of fillers.
      block: tokens of a block, at least 3.
      fillers: their number; tokens begin at 1.
      values: number of values; tokens begin behind the fillers.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 1_000_000,
        blocks: int = 8,
        block: int = 8,
        fillers: int = 64,
        values: int = 200,
    ):
        _check_least(
            blocks=(blocks, 1),
            block=(block, 3),
            fillers=(fillers, 1),
            values=(values, 2),
        )
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._blocks, self._block = blocks, block
        self._fillers, self._values = fillers, values
        self.length = blocks * block + 4
        self.vocab_size = 1 + fillers + values + 2

    @property
    def chance(self) -> float:
        """Share of right pairs of who does not see the key."""
        return 1 / self._values**2

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        tokens = rng.integers(1, self._fillers + 1, self.length)
        values = rng.integers(self._values, size=2) + self._fillers + 1
        ask, key = self.vocab_size - 1, self.vocab_size - 2
        place = rng.integers(self._blocks) * self._block + rng.integers(self._block - 2)
        tokens[place : place + 3] = key, *values
        tokens[-4:] = ask, key, *values
        scored = np.zeros(self.length, bool)
        scored[-2:] = True
        holder = np.where(scored, place // self._block, -1)
        return {
            "tokens": tokens.astype(np.int32), "scored": scored, "holder": holder.astype(np.int32),
        }  # fmt: skip


def _check_least(**values: tuple[int, int]) -> None:
    """Refuse the first value, given with the least that it may be, that is below it."""
    for name, (value, least) in values.items():
        if value < least:
            raise RecipeError(f"source.{name}={value}: must be at least {least}")
