# SPDX-License-Identifier: Apache-2.0
"""Text: a Markov source of known entropy, folders of files or of tokens, the handbook of Python."""

import bisect
import hashlib
import importlib
import itertools
import os
import pathlib
import zlib
from collections.abc import Sequence

import numpy as np

from attnjax.data.tokenizers import BYTES, make_tokenizer
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


class DocumentWindows:
    """Documents one after another, cut into texts of one length.

    `segments` numbers the documents of a text from 1 on, and is 0 where the last text is filled up.

    Args:
      sizes: tokens of every document.
      length: tokens of a text.

    Raises:
      RecipeError: the length is below 2.
    """

    def __init__(self, sizes: Sequence[int], length: int):
        _check_length(length)
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

    def _first_document(self, index):
        """Return the number of the document in which a text begins."""
        return bisect.bisect_right(self._ends, index * self._length)

    def _read(self, number, offset, count):
        """Return tokens of a document, `[count]`."""
        raise NotImplementedError


class TextFiles(DocumentWindows):
    """Every .txt file of a folder, one after another, cut into texts of one length.

    PG-19 comes in this form: a file per book under train, validation and test. Files are read when
    they are needed. A tokenizer other than "bytes" goes through all files once, and keeps their
    tokens beside them.

    Args:
      root: folder that holds the folder of the split, which holds the files, at any depth.
      split: name of that folder.
      length: tokens of a text.
      tokenizer: "bytes", or the path of a `tokenizers` JSON file.
      reserved: tokens before those of the tokenizer: 0, or 4 for padding, beginning, end, mask.
      cache: folder of the tokens; "" takes `root/.tokens`.

    Raises:
      RecipeError: there is no such folder, no .txt file in it, or an empty one; no such tokenizer;
        or tokens cannot be kept.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        length: int = 1024,
        tokenizer: str = BYTES,
        reserved: int = 0,
        cache: str = "",
    ):
        _check_length(length)
        expand = lambda path: pathlib.Path(os.path.expanduser(os.path.expandvars(path)))
        folder = expand(root) / split
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
        self._tokenizer = make_tokenizer(tokenizer, reserved)
        self.vocab_size = self._tokenizer.vocab_size
        self._tokens: list[pathlib.Path] = []
        if tokenizer != BYTES:
            kept = expand(cache) if cache else expand(root) / ".tokens"
            kept = kept / _digest(expand(tokenizer)) / str(reserved) / split
            for path in self._files:
                file = kept / path.relative_to(folder).with_suffix(".npy")
                _keep(file, path, self._tokenizer)
                self._tokens.append(file)
            sizes = [len(_open(file)) for file in self._tokens]
        super().__init__(sizes, length)

    def locate(self, index: int) -> str:
        """Return the path of the file in which a text begins."""
        return str(self._files[self._first_document(index)])

    def _read(self, number, offset, count):
        if self._tokens:
            return np.array(_open(self._tokens[number])[offset : offset + count])
        with open(self._files[number], "rb") as file:
            file.seek(offset)
            data = file.read(count)
        if len(data) != count:
            raise OSError(f"{self._files[number]} is shorter than when the run began")
        return self._tokenizer.encode(data)


class TokenFiles(DocumentWindows):
    """Every .bin file of a folder: nothing but token numbers, little-endian, one after another.

    Files are mapped into memory, never read whole.

    Args:
      root: folder that holds the folder of the split, which holds the files, at any depth.
      split: name of that folder.
      length: tokens of a text.
      vocab_size: number of tokens there are.
      dtype: of a stored number, "uint16" or "uint32".

    Raises:
      RecipeError: there is no such folder, no .bin file in it, one without whole numbers, or
        no such dtype.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        length: int = 2048,
        vocab_size: int = 65_536,
        dtype: str = "uint16",
    ):
        _check_length(length)
        if dtype not in ("uint16", "uint32"):
            raise RecipeError(f"source.dtype={dtype!r}: must be 'uint16' or 'uint32'")
        folder = pathlib.Path(os.path.expanduser(os.path.expandvars(root))) / split
        self._files = sorted(path for path in folder.rglob("*.bin") if path.is_file())
        if not self._files:
            raise RecipeError(
                f"source.root={root!r}: no .bin file in {folder}, expected token files such as "
                "<root>/<split>/shard_0.bin"
            )
        self._dtype, self.vocab_size = np.dtype(dtype).newbyteorder("<"), vocab_size
        sizes = [path.stat().st_size for path in self._files]
        for path, size in zip(self._files, sizes, strict=True):
            if not size or size % self._dtype.itemsize:
                raise RecipeError(
                    f"source.root={root!r}: {path} has {size} bytes, which are no whole {dtype}"
                )
        super().__init__([size // self._dtype.itemsize for size in sizes], length)

    def locate(self, index: int) -> str:
        """Return the path of the file in which a text begins."""
        return str(self._files[self._first_document(index)])

    def _read(self, number, offset, count):
        tokens = np.memmap(self._files[number], self._dtype, mode="r")[offset : offset + count]
        return tokens.astype(np.int32)


class StandardLibraryText(DocumentWindows):
    """The handbook of the Python language that ships with Python: about 0.3 million bytes.

    Its topics (`pydoc_data.topics`) are the documents, in the order of their names; which are held
    out depends on the names alone. Topics quote each other: of equal paragraphs only the first is
    kept, and none of training is among those held out. The text differs a little between versions
    of Python.

    Args:
      split: "train", or "test": about a tenth of the topics.
      length: bytes of a text.
      reserved: tokens before those of the bytes: 0, or 4 for padding, beginning, end, mask.
    """

    def __init__(self, split: str = "train", length: int = 256, reserved: int = 0):
        if split not in _STREAMS:
            raise RecipeError(f"source.split={split!r}: must be 'train' or 'test'")
        tokenizer = make_tokenizer(BYTES, reserved)
        self.vocab_size = tokenizer.vocab_size
        self._documents = [tokenizer.encode(text.encode()) for text in _handbook()[split]]
        super().__init__([len(tokens) for tokens in self._documents], length)

    def _read(self, number, offset, count):
        return self._documents[number][offset : offset + count]


def _open(file):
    """Return tokens that are read when they are needed; not kept, since files are many."""
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _handbook():
    """Return the texts of both splits, without what they share."""
    topics = importlib.import_module("pydoc_data.topics").topics
    is_held_out = {name: zlib.crc32(name.encode()) % 10 == 0 for name in sorted(topics)}
    texts: dict[str, list[str]] = {"train": [], "test": []}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (not is_held_out[name], name)):
        paragraphs = dict.fromkeys(p.strip("\n") for p in topics[name].split("\n\n"))
        new = [paragraph for paragraph in paragraphs if paragraph and paragraph not in seen]
        seen.update(new)
        if new:
            texts["test" if is_held_out[name] else "train"].append("\n\n".join(new) + "\n\n")
    return texts


def _check_length(length):
    if length < 2:
        raise RecipeError(f"source.length={length}: must be at least 2")


def _digest(path):
    """Return a short hash of a file, which tells tokens of one tokenizer from another's."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _keep(file, path, tokenizer):
    """Write the tokens of a text to a file, if it is missing or older."""
    try:
        if not file.is_file() or file.stat().st_mtime < path.stat().st_mtime:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.stem}.{os.getpid()}.part.npy")
            np.save(part, tokenizer.encode(path.read_bytes()))
            part.replace(file)
    except OSError as error:
        raise RecipeError(f"source.cache: {file} cannot be kept: {error}") from error


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
