# SPDX-License-Identifier: Apache-2.0
"""Pairs of sequences: articles with summaries, and copies whose answer is known.

Every example has `source [s]` and `target [t]`, int32: 0 is padding, 2 ends a target. Targets that
are cut have no end.
"""

import json
import os
import pathlib

import numpy as np

from attnjax import registry
from attnjax.data.lra import Lines, fit
from attnjax.data.sources import TensorFlowDatasets
from attnjax.data.synthetic import stream
from attnjax.data.tokenizers import BYTES, END, make_tokenizer
from attnjax.errors import RecipeError

ORDERS = ("copy", "reverse", "sort")
_FIRST = END + 1
_FORMATS = (".jsonl", ".tsv")


class CopySort:
    """Symbols to be copied, written backwards or sorted: causal cross-attention can do it exactly.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: symbols of a source.
      symbols: how many there are; their tokens begin at 3.
      order: "copy", "reverse" or "sort".
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 131_072,
        length: int = 16,
        symbols: int = 16,
        order: str = "copy",
    ):
        for name, value in (("length", length), ("symbols", symbols), ("size", size)):
            if value < 1:
                raise RecipeError(f"source.{name}={value}: must be at least 1")
        if order not in ORDERS:
            raise RecipeError(f"source.order={order!r}: {registry.nearest(order, ORDERS)}")
        self._stream, self._seed, self._size = stream(split, seed, size)
        self._length, self._symbols, self._order = length, symbols, order
        self.vocab_size = _FIRST + symbols

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        source = _FIRST + rng.integers(self._symbols, size=self._length).astype(np.int32)
        answer = {"copy": source, "reverse": source[::-1], "sort": np.sort(source)}[self._order]
        return {"source": source, "target": np.append(answer, END).astype(np.int32)}


class TextPairs:
    """Pairs of texts from one file per split: `<root>/<split>.jsonl`, or `.tsv` with two columns.

    Args:
      root: folder of the files.
      split: such as "train", "validation" or "test".
      lengths: most tokens of a source and of a target, the end included.
      tokenizer: "bytes", or the path of a `tokenizers` JSON file.
      fields: names of source and target in a line of JSON.

    Raises:
      RecipeError: no such file or tokenizer.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        lengths: tuple = (4096, 400),
        tokenizer: str = BYTES,
        fields: tuple = ("document", "summary"),
    ):
        folder = pathlib.Path(os.path.expandvars(root)).expanduser()
        files = [folder / f"{split}{ending}" for ending in _FORMATS]
        present = [file for file in files if file.is_file()]
        if not present:
            raise RecipeError(f"source.root={root!r}: no file {' or '.join(map(str, files))}")
        self._lines, self._fields = Lines(present[0]), _two("fields", fields)
        self._lengths, self._tokenizer = _two("lengths", lengths), make_tokenizer(tokenizer)
        self._is_json = present[0].suffix == ".jsonl"
        self.vocab_size = self._tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _encode(self._texts(self._lines[index]), self._lengths, self._tokenizer)

    def locate(self, index: int) -> str:
        """Return "file:line", lines counted from 1."""
        return self._lines.locate(index)

    def _texts(self, line):
        if not self._is_json:
            texts = line.split("\t")
            if len(texts) != 2:
                raise ValueError(f"{len(texts)} columns, expected a source, a tab and a target")
            return texts
        record = json.loads(line)
        missing = [name for name in self._fields if name not in record]
        if missing:
            raise ValueError(f"no field {', '.join(missing)} among {', '.join(sorted(record))}")
        return [record[name] for name in self._fields]


class MultiNews:
    """Multi-News as TensorFlow Datasets prepares it: several articles and a summary of them.

    Args:
      split: such as "train", "validation" or "test".
      data_dir: folder of prepared data sets; "" takes $TFDS_DATA_DIR or ~/tensorflow_datasets.
      lengths: most tokens of articles and of a summary, the end included.
      tokenizer: "bytes", or the path of a `tokenizers` JSON file.
      dataset: another data set with the fields `document` and `summary`.

    Raises:
      RecipeError: it is not prepared there, or no such tokenizer.
    """

    def __init__(
        self,
        split: str = "train",
        data_dir: str = "",
        lengths: tuple = (4096, 400),
        tokenizer: str = BYTES,
        dataset: str = "multi_news",
    ):
        self._tokenizer, self._lengths = make_tokenizer(tokenizer), _two("lengths", lengths)
        self._records = TensorFlowDatasets(dataset, split, data_dir)
        self.vocab_size = self._tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        texts = [record["document"], record["summary"]]
        return _encode(texts, self._lengths, self._tokenizer)

    def locate(self, index: int) -> str:
        """Return the data set, split and folder a record comes from."""
        return self._records.locate(index)


def _encode(texts, lengths, tokenizer):
    texts = [text if isinstance(text, bytes) else str(text).encode() for text in texts]
    source, target = (tokenizer.encode(text) for text in texts)
    return {"source": fit(source, lengths[0]), "target": fit(np.append(target, END), lengths[1])}


def _two(name, value):
    if len(value) != 2:
        raise RecipeError(
            f"source.{name}={value!r}: must be one for the source, one for the target"
        )
    return tuple(value)
