# SPDX-License-Identifier: Apache-2.0
"""Readers of the Long Range Arena as it lies on disk, and small real sequences.

Tay et al., "Long Range Arena", arXiv 2011.04006. Nothing is downloaded. Token 0 is padding; bytes
and grey values are shifted by one. A wrong layout is refused when the source is made, a bad line or
file when it is read; both name the file, and the line where there are lines.
"""

import os
import pathlib

import numpy as np
from PIL import Image

from attnjax import registry
from attnjax.data.records import check_on_error
from attnjax.data.sequences import LISTOPS_TOKENS
from attnjax.data.sources import Digits, check_split
from attnjax.errors import RecipeError

_SPLITS = ("train", "val", "test")
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


class LraListOps:
    """ListOps from `basic_train.tsv`, `basic_val.tsv`, `basic_test.tsv`: columns Source, Target.

    Args:
      root: folder of the files.
      split: "train", "val" or "test".
      length: tokens; longer expressions are cut.
      on_error: "raise", or "skip" to replace bad lines.

    Raises:
      RecipeError: no such file, or its header lacks a column.
    """

    num_classes = 10
    vocab = len(LISTOPS_TOKENS) + 1

    def __init__(
        self, root: str, split: str = "train", length: int = 2_000, on_error: str = "raise"
    ):
        self.on_error = check_on_error(on_error)
        path = _expand(root) / f"basic_{check_split(split, _SPLITS)}.tsv"
        self._lines = Lines(path)
        header = self._lines[0].split("\t")
        for column in ("Source", "Target"):
            if column not in header:
                raise RecipeError(f"{path}:1: no column {column!r}; the header is {header}")
        self._source, self._target = header.index("Source"), header.index("Target")
        self._length = length

    def __len__(self) -> int:
        return len(self._lines) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        cells = self._lines[index + 1].split("\t")
        where = self.locate(index)
        if len(cells) <= max(self._source, self._target):
            raise ValueError(f"{where}: {len(cells)} columns")
        if cells[self._target] not in tuple("0123456789"):
            raise ValueError(f"{where}: target {cells[self._target]!r} is no digit")
        words = [w for w in cells[self._source].split() if w not in ("(", ")")]
        unknown = [word for word in words if word not in LISTOPS_TOKENS]
        if unknown:
            raise ValueError(f"{where}: unknown token {unknown[0]!r}")
        tokens = np.array([LISTOPS_TOKENS[word] for word in words], np.int32)
        return {"tokens": fit(tokens, self._length), "label": np.int32(cells[self._target])}

    def locate(self, index: int) -> str:
        """Return the file and line of an expression."""
        return self._lines.locate(index + 1)


class LraText:
    """IMDb reviews as bytes, from `root/<split>/pos/*.txt` (label 1) and `neg` (label 0).

    Args:
      root: folder that holds the splits.
      split: "train" or "test".
      length: bytes; longer texts are cut, shorter ones padded with 0.
      on_error: "raise", or "skip" to replace files that cannot be read.

    Raises:
      RecipeError: a folder is missing or empty.
    """

    num_classes = 2
    vocab = 257

    def __init__(
        self, root: str, split: str = "train", length: int = 4_096, on_error: str = "raise"
    ):
        self.on_error = check_on_error(on_error)
        base = _expand(root) / check_split(split, ("train", "test"))
        self._files, self._length = [], length
        for label, name in enumerate(("neg", "pos")):
            files = sorted((base / name).glob("*.txt"))
            if not files:
                raise RecipeError(f"source.root={root!r}: no *.txt in {base / name}")
            self._files += [(file, label) for file in files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path, label = self._files[index]
        return {"tokens": fit(byte_tokens(path.read_bytes()), self._length),
                "label": np.int32(label)}  # fmt: skip

    def locate(self, index: int) -> str:
        """Return the file of a review."""
        return str(self._files[index][0])


class LraRetrieval:
    """Pairs of AAN papers as bytes, from `new_aan_pairs.{train,eval,test}.tsv` without header.

    Columns are label, id1, id2, text1, text2; label 1 says that one cites the other.

    Args:
      root: folder of the files.
      split: "train", "eval" or "test".
      length: bytes of each text.
      on_error: "raise", or "skip" to replace bad lines.

    Raises:
      RecipeError: no such file.
    """

    num_classes = 2
    vocab = 257

    def __init__(
        self, root: str, split: str = "train", length: int = 4_000, on_error: str = "raise"
    ):
        self.on_error = check_on_error(on_error)
        check_split(split, ("train", "eval", "test"))
        self._lines = Lines(_expand(root) / f"new_aan_pairs.{split}.tsv")
        self._length = length

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        cells = self._lines[index].split("\t")
        if len(cells) != 5:
            raise ValueError(
                f"{self.locate(index)}: {len(cells)} columns, expected label, id1, id2, text1, "
                "text2"
            )
        try:
            label = float(cells[0])
        except ValueError:
            label = -1.0
        if label not in (0.0, 1.0):
            raise ValueError(f"{self.locate(index)}: label {cells[0]!r} is neither 0 nor 1")
        texts = [fit(byte_tokens(text.encode()), self._length) for text in cells[3:]]
        return {"tokens": np.stack(texts), "label": np.int32(label)}

    def locate(self, index: int) -> str:
        """Return the file and line of a pair."""
        return self._lines.locate(index)


class LraPathfinder:
    """Pathfinder or Path-X pictures listed by `root/metadata/*.npy`, pixels as a sequence.

    A line of metadata is "folder file number label ...", separated by spaces; the files are plain
    text whatever their name says, or arrays of such strings. Pictures are `root/folder/file`.

    Args:
      root: such as ".../pathfinder32/curv_contour_length_14".
      split: "train", "val" or "test": 80, 10 and 10 percent, by position.
      side: pixels of a side.
      on_error: "raise", or "skip" to replace pictures that cannot be decoded.

    Raises:
      RecipeError: no metadata, or a line of it that makes no sense (file and line are named).
    """

    num_classes = 2

    def __init__(self, root: str, split: str = "train", side: int = 32, on_error: str = "raise"):
        self.on_error = check_on_error(on_error)
        check_split(split, _SPLITS)
        self._root, self._side = _expand(root), side
        files = sorted((self._root / "metadata").glob("*.npy"), key=lambda f: (len(f.name), f.name))
        if not files:
            raise RecipeError(f"source.root={root!r}: no *.npy in {self._root / 'metadata'}")
        entries = []
        for file in files:
            for number, cells in enumerate(_metadata(file), 1):
                if len(cells) < 4 or cells[3] not in ("0", "1"):
                    raise RecipeError(
                        f"{file}:{number}: expected 'folder file number label', got {cells[:6]}"
                    )
                entries.append((f"{cells[0]}/{cells[1]}", int(cells[3])))
        first, second = len(entries) * 8 // 10, len(entries) * 9 // 10
        bounds = {"train": (0, first), "val": (first, second), "test": (second, len(entries))}
        self._entries = entries[slice(*bounds[split])]
        if not self._entries:
            raise RecipeError(f"source.root={root!r}: {len(entries)} pictures leave {split} empty")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        with Image.open(self.locate(index)) as image:
            pixels = np.asarray(image.convert("L"), np.float32) / 255
        if pixels.shape != (self._side, self._side):
            raise ValueError(f"{self.locate(index)}: {pixels.shape}, expected side {self._side}")
        return {"values": pixels.reshape(-1, 1), "label": np.int32(self._entries[index][1])}

    def locate(self, index: int) -> str:
        """Return the path of a picture."""
        return str(self._root / self._entries[index][0])


class LraImage:
    """CIFAR-10 in grey, 1,024 tokens of 256 levels, from the binary version of the data set.

    Args:
      root: folder of `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.
      split: "train" or "test".

    Raises:
      RecipeError: a file is missing or not made of records of 3,073 bytes.
    """

    num_classes = 10
    vocab = 257

    def __init__(self, root: str, split: str = "train"):
        check_split(split, ("train", "test"))
        names = [f"data_batch_{i}.bin" for i in range(1, 6)]
        parts = []
        for name in names if split == "train" else ["test_batch.bin"]:
            path = _expand(root) / name
            if not path.is_file():
                raise RecipeError(f"source.root={root!r}: no file {path}")
            content = np.fromfile(path, np.uint8)
            if content.size == 0 or content.size % 3073:
                raise RecipeError(f"{path}: {content.size} bytes are no records of 3,073")
            parts.append(content.reshape(-1, 3073))
            wrong = np.flatnonzero(parts[-1][:, 0] > 9)
            if wrong.size:
                raise RecipeError(f"{path}: record {wrong[0]} has class {parts[-1][wrong[0], 0]}")
        self._records = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        grey = np.rint(_GREY @ record[1:].reshape(3, 1024).astype(np.float32))
        return {"tokens": 1 + grey.astype(np.int32), "label": np.int32(record[0])}


class DigitSequences:
    """The handwritten digits of scikit-learn, pixel by pixel: 64 steps, or 1,024 when enlarged.

    Args:
      split: "train" or "test".
      seed: decides the split, not the order.
      steps: 64 (8 x 8), or 1024 (every pixel repeated 4 x 4).
    """

    num_classes = 10

    def __init__(self, split: str = "train", seed: int = 0, steps: int = 64):
        if steps not in (64, 1024):
            raise RecipeError(f"source.steps={steps}: must be 64 or 1024")
        self._digits = Digits(split, seed)
        self._repeat = {64: 1, 1024: 4}[steps]

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._digits[index]
        pixels = example["image"][..., 0].astype(np.float32) / 255
        pixels = pixels.repeat(self._repeat, axis=0).repeat(self._repeat, axis=1)
        return {"values": pixels.reshape(-1, 1), "label": example["label"]}


class TextBytes:
    """Windows of bytes of one text, for predicting the next byte.

    Args:
      path: a text file; "" takes the descriptions of data sets that ship with scikit-learn.
      split: "train" (the first nine tenths) or "test".
      length: bytes of a window; windows start every `stride` bytes.
      stride: bytes between starts; 0 for the length.

    Raises:
      RecipeError: no such file, or it is shorter than one window.
    """

    vocab = 257

    def __init__(self, path: str = "", split: str = "train", length: int = 256, stride: int = 0):
        check_split(split, ("train", "test"))
        content = _read(path) if path else _descriptions()
        cut = len(content) * 9 // 10
        self._tokens = byte_tokens(content[:cut] if split == "train" else content[cut:])
        self._length, self._stride = length, stride or length
        if length < 2 or len(self._tokens) < length:
            raise RecipeError(
                f"source.length={length}: {path or 'the text'} leaves {len(self._tokens)} bytes "
                f"for {split}"
            )

    def __len__(self) -> int:
        return (len(self._tokens) - self._length) // self._stride + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._stride
        return {"tokens": self._tokens[start : start + self._length]}


class Lines:
    """The lines of a text file by random access: only where they start is kept.

    Args:
      path: the file.

    Raises:
      RecipeError: no such file, or it is empty.
    """

    def __init__(self, path: pathlib.Path):
        if not path.is_file():
            present = sorted(f.name for f in path.parent.glob("*")) if path.parent.is_dir() else []
            raise RecipeError(f"no file {path}: {registry.nearest(path.name, present[:20])}")
        self._path = path
        self._starts = [0]
        with path.open("rb") as file:
            for line in file:
                self._starts.append(self._starts[-1] + len(line))
        if len(self._starts) < 2:
            raise RecipeError(f"{path}: the file is empty")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.read(self._starts[index + 1] - self._starts[index])
        return line.decode(errors="replace").rstrip("\r\n")

    def locate(self, index: int) -> str:
        """Return "file:line", lines counted from 1."""
        return f"{self._path}:{index + 1}"


def byte_tokens(content: bytes) -> np.ndarray:
    """Return bytes as int32 tokens 1 to 256."""
    return 1 + np.frombuffer(content, np.uint8).astype(np.int32)


def fit(tokens: np.ndarray, length: int) -> np.ndarray:
    """Cut tokens to a length, or pad them with 0."""
    fitted = np.zeros(length, np.int32)
    fitted[: min(length, len(tokens))] = tokens[:length]
    return fitted


def _metadata(file):
    """Return the cells of every line of a metadata file, text or array."""
    with file.open("rb") as opened:
        is_array = opened.read(6) == b"\x93NUMPY"
    if not is_array:
        return [line.split() for line in file.read_text().splitlines()]
    try:
        rows = np.load(file, allow_pickle=False)
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from error
    rows = rows[:, None] if rows.ndim == 1 else rows
    return [" ".join(map(str, row)).split() for row in rows]


def _expand(root):
    return pathlib.Path(os.path.expandvars(root)).expanduser()


def _read(path):
    try:
        return _expand(path).read_bytes()
    except OSError as error:
        raise RecipeError(f"source.path={path!r} cannot be read: {error}") from error


def _descriptions():
    import sklearn.datasets

    folder = pathlib.Path(sklearn.datasets.__file__).parent / "descr"
    return b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.rst")))
