# SPDX-License-Identifier: Apache-2.0
"""Text that is tokens already, or lines of JSON: flat .bin files, .jsonl and .jsonl.zst files.

`PackedTokens` reads what most trainers of language models write (a flat array of uint16 or uint32),
`JsonLines` the form in which corpora such as SlimPajama are published, and `pack` turns documents
into the former.
"""

import bisect
import contextlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from attnjax.data.text import DocumentWindows
from attnjax.data.tokenizers import BYTES, Tokenizer, make_tokenizer
from attnjax.errors import RecipeError

DTYPES = ("uint16", "uint32")
_BLOCK = 1 << 22


class PackedTokens(DocumentWindows):
    """Flat files of tokens, little-endian, cut into texts of one length; read when it is needed.

    Examples have `tokens` and `segments`, see `DocumentWindows`. A text may begin in one file and
    end in the next.

    Args:
      root: folder of the files.
      split: one file `root/SPLIT.bin`, or all .bin files of the folder `root/SPLIT`, at any depth.
      length: tokens of a text.
      dtype: of the files, member of `DTYPES`.
      end: token that ends every document; documents do not see each other; -1: one per file.

    Raises:
      RecipeError: there is no such file, or its size does not fit.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        length: int = 1024,
        dtype: str = "uint16",
        end: int = -1,
    ):
        if length < 2:
            raise RecipeError(f"source.length={length}: must be at least 2")
        if dtype not in DTYPES:
            raise RecipeError(f"source.dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        folder, self._dtype = _expand(root), np.dtype(dtype).newbyteorder("<")
        single = folder / f"{split}.bin"
        self._files = [single] if single.is_file() else sorted((folder / split).rglob("*.bin"))
        if not self._files:
            present = sorted(path.name for path in folder.glob("*.bin"))[:8]
            raise RecipeError(
                f"source.root={root!r}: no file {single} (there: {present}) and no .bin file in "
                f"{folder / split}"
            )
        for path in self._files:
            size = path.stat().st_size
            if not size or size % self._dtype.itemsize:
                raise RecipeError(
                    f"{path}: {size} bytes, must be a multiple of {self._dtype.itemsize} above 0 "
                    f"for source.dtype={dtype!r}"
                )
        self._firsts: list[int] = []  # documents before each file
        sizes: list[int] = []
        for number in range(len(self._files)):
            self._firsts.append(len(sizes))
            sizes += self._sizes(number, end)
        super().__init__(sizes, length)

    def locate(self, index: int) -> str:
        """Return the path of the file in which a text begins."""
        return str(self._files[self._file(self._first_document(index))])

    def _file(self, document):
        return bisect.bisect_right(self._firsts, document) - 1

    def _open(self, number):
        return np.memmap(self._files[number], self._dtype, mode="r")

    def _sizes(self, number, end):
        tokens = self._open(number)
        if end < 0:
            return [len(tokens)]
        sizes, last = [], 0
        for start in range(0, len(tokens), _BLOCK):
            for place in np.flatnonzero(tokens[start : start + _BLOCK] == end):
                sizes.append(start + int(place) + 1 - last)
                last = start + int(place) + 1
        return sizes + [len(tokens) - last] * (last < len(tokens))

    def _read(self, number, offset, count):
        file = self._file(number)
        before = lambda document: self._ends[document - 1] if document else 0
        begin = before(number) - before(self._firsts[file]) + offset
        return np.array(self._open(file)[begin : begin + count], np.int32)


class JsonLines(PackedTokens):
    """Documents of .jsonl and .jsonl.zst files, tokenised once and kept beside them as .bin.

    Args:
      root: folder that holds the folder of the split, which holds the files, at any depth.
      split: name of that folder.
      length: tokens of a text.
      tokenizer: "bytes", or the path of a `tokenizers` JSON file.
      field: of every line's object, its text.
      reserved: tokens before those of the tokenizer; with at least 3, token 2 ends each document.

    Raises:
      RecipeError: there is no such folder or file, a line is no JSON object with that text (file
        and line are named), or `zstandard` is missing.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        length: int = 1024,
        tokenizer: str = BYTES,
        field: str = "text",
        reserved: int = 4,
    ):
        if reserved < 3:
            raise RecipeError(f"source.reserved={reserved}: must be at least 3, 2 ends documents")
        folder = _expand(root) / split
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.name.endswith((".jsonl", ".jsonl.zst")) and path.is_file()
        )
        if not files:
            raise RecipeError(
                f"source.root={root!r}: no .jsonl or .jsonl.zst file in {folder}, expected files "
                "such as <root>/<split>/part.jsonl.zst"
            )
        made = make_tokenizer(tokenizer, reserved)
        self.vocab_size = made.vocab_size
        kept = _expand(root) / ".tokens" / f"{split}-{_name(tokenizer)}-{reserved}.bin"
        newest = max(path.stat().st_mtime for path in files)
        if not kept.is_file() or kept.stat().st_mtime < newest:
            pack((text for path in files for text in read_lines(path, field)), kept, made, END)
        super().__init__(str(kept.parent), kept.stem, length, "uint32", END)


END = 2
"""Token that ends a document, of those reserved."""


def read_lines(path: str | pathlib.Path, field: str = "text") -> Iterator[str]:
    """Yield the texts of a .jsonl or .jsonl.zst file.

    Raises:
      RecipeError: a line is no JSON object with that text, or `zstandard` is missing.
    """
    path = pathlib.Path(path)
    with contextlib.ExitStack() as stack:
        file: io.TextIOBase | io.TextIOWrapper
        if path.name.endswith(".zst"):
            try:
                import zstandard
            except ImportError as error:
                raise RecipeError(
                    f"{path} needs the package zstandard: pip install 'attnjax[text]'"
                ) from error
            raw = stack.enter_context(path.open("rb"))
            stream = stack.enter_context(zstandard.ZstdDecompressor().stream_reader(raw))
            file = io.TextIOWrapper(stream, encoding="utf-8")
        else:
            file = stack.enter_context(path.open(encoding="utf-8"))
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                if not isinstance(text, str):
                    raise TypeError(f"{field} is {type(text).__name__}")
            except (ValueError, KeyError, TypeError) as error:
                raise RecipeError(
                    f"{path}:{number}: no JSON object with the text {field!r}: {error}"
                ) from error
            yield text


def pack(
    texts: Iterable[str], path: str | pathlib.Path, tokenizer: Tokenizer, end: int,
    dtype: str = "uint32",
) -> int:  # fmt: skip
    """Write documents as one flat file of tokens, each followed by its end.

    Args:
      texts: documents.
      path: file to write; it appears whole or not at all.
      tokenizer: see `tokenizers`.
      end: token behind every document.
      dtype: member of `DTYPES`.

    Returns:
      The number of tokens.

    Raises:
      RecipeError: a token does not fit the dtype, or the file cannot be written.
    """
    path, count, limit = pathlib.Path(path), 0, np.iinfo(dtype).max
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for text in texts:
                tokens = np.append(tokenizer.encode(text.encode()), end)
                if tokens.max() > limit:
                    raise RecipeError(f"token {tokens.max()} does not fit dtype={dtype!r}")
                file.write(tokens.astype(dtype).tobytes())
                count += len(tokens)
        part.replace(path)
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return count


def _expand(path):
    return pathlib.Path(os.path.expanduser(os.path.expandvars(path)))


def _name(tokenizer):
    return BYTES if tokenizer == BYTES else pathlib.Path(tokenizer).stem
