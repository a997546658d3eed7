# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: a Markov source whose entropy is known, and folders of text files."""

import bisect
import itertools
import os
import pathlib

import numpy as np

from attnjax.errors import RecipeError

_STREAMS = {"train": 0, "test": 1}  # splits draw from unrelated random streams
_FIRST = 97  # bytes of symbols begin with the letter a
_ITERATIONS = 10_000


class MarkovText:
    """Letters of a Markov chain: no model predicts them better than the chain's entropy rate.

    P(symbol | last `order` symbols) is drawn once from Dirichlet(concentration); texts begin in the
    stationary distribution. `entropy` is the rate in nats per symbol, sum_c pi(c) H(P(. | c)): the
    expected loss of the best predictor that has seen `order` symbols.

    Args:
      split: "train" or "test", never sharing a text.
      seed: a different chain and different texts for every value.
      size: texts.
      length: symbols of a text.
      symbols: letters of the alphabet, at most 26.
      order: symbols that the next one depends on.
      concentration: of the Dirichlet distribution; low values are easy to predict.

    Attributes:
      entropy: nats per symbol. The first `order` symbols of a text tell less about their next
        ones: the mean over a text is above it by a share of the order of `order / length`.
    """

    vocab_size = 256

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 65_536,
        length: int = 128,
        symbols: int = 8,
        order: int = 1,
        concentration: float = 0.3,
    ):
        if split not in _STREAMS:
            raise RecipeError(f"source.split={split!r}: must be 'train' or 'test'")
        for name, value, fine in (
            ("size", size, size >= 1),
            ("length", length, length >= 2),
            ("symbols", symbols, 2 <= symbols <= 26),
            ("order", order, order >= 1 and symbols ** max(order, 1) <= 1_000_000),
            ("concentration", concentration, concentration > 0),
        ):
            if not fine:
                raise RecipeError(f"source.{name}={value!r} is out of range")
        self._stream, self._seed, self._size = _STREAMS[split], seed % 2**64, size
        self._length, self._symbols, self._order = length, symbols, order
        contexts = symbols**order
        rng = np.random.default_rng((self._seed, 2))
        table = rng.dirichlet(np.full(symbols, concentration), contexts) + 1e-6
        self._table = table / table.sum(axis=1, keepdims=True)
        self._stationary = _stationary(self._table, symbols)
        rows = -np.sum(self._table * np.log(self._table), axis=1)
        self.entropy = float(self._stationary @ rows)
        self._cumulative = np.cumsum(self._table, axis=1)[:, :-1].tolist()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        contexts, symbols = len(self._table), self._symbols
        context = int(rng.choice(contexts, p=self._stationary))
        first = [context // symbols**i % symbols for i in reversed(range(self._order))]
        chain, table = list(first), self._cumulative
        for draw in rng.random(max(0, self._length - self._order)).tolist():
            symbol = bisect.bisect_right(table[context], draw)
            chain.append(symbol)
            context = (context * symbols + symbol) % contexts
        return {"tokens": _FIRST + np.asarray(chain[: self._length], np.int32)}


class TextFiles:
    """Every .txt file of a folder as bytes, one after another, cut into texts of one length.

    Each file is a document: `segments` numbers those of a text from 1 on, and is 0 where the last
    text is filled up. Files are read when they are needed.

    Args:
      root: folder that holds the folder of the split, which holds the files, at any depth.
      split: name of that folder.
      length: bytes of a text.

    Raises:
      RecipeError: there is no such folder, no .txt file in it, or an empty one.
    """

    vocab_size = 256

    def __init__(self, root: str, split: str = "train", length: int = 1024):
        if length < 2:
            raise RecipeError(f"source.length={length}: must be at least 2")
        folder = pathlib.Path(os.path.expanduser(os.path.expandvars(root))) / split
        expected = "expected text files such as <root>/<split>/chapter.txt"
        if not folder.is_dir():
            raise RecipeError(f"source.root={root!r}: no folder {folder}, {expected}")
        self._files = sorted(path for path in folder.rglob("*.txt") if path.is_file())
        if not self._files:
            raise RecipeError(f"source.root={root!r}: no .txt file in {folder}, {expected}")
        sizes = [path.stat().st_size for path in self._files]
        for path, size in zip(self._files, sizes, strict=True):
            if not size:
                raise RecipeError(f"source.root={root!r}: {path} is empty")
        self._ends = list(itertools.accumulate(sizes))
        self._length = length

    def __len__(self) -> int:
        return -(-self._ends[-1] // self._length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens, segments = np.zeros((2, self._length), np.int32)
        start = index * self._length
        stop = min(start + self._length, self._ends[-1])
        first = number = bisect.bisect_right(self._ends, start)
        at = start
        while at < stop:
            begin = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            place = slice(at - start, end - start)
            tokens[place] = self._read(number, at - begin, end - at)
            segments[place] = number - first + 1
            at, number = end, number + 1
        return {"tokens": tokens, "segments": segments}

    def locate(self, index: int) -> str:
        """Return the path of the file in which a text begins."""
        return str(self._files[bisect.bisect_right(self._ends, index * self._length)])

    def _read(self, number, offset, count):
        with open(self._files[number], "rb") as file:
            file.seek(offset)
            data = file.read(count)
        if len(data) != count:
            raise OSError(f"{self._files[number]} is shorter than when the run began")
        return np.frombuffer(data, np.uint8)


def _stationary(table, symbols):
    """Return the stationary distribution of contexts, by iterating the chain."""
    contexts = len(table)
    following = (np.arange(contexts)[:, None] * symbols + np.arange(symbols)) % contexts
    share = np.full(contexts, 1 / contexts)
    for _ in range(_ITERATIONS):
        after = np.zeros(contexts)
        np.add.at(after, following, share[:, None] * table)
        # Half a step cannot oscillate, and has the same fixed point.
        after = (after + share) / 2
        if np.abs(after - share).sum() < 1e-13:
            break
        share = after
    return after / after.sum()
