# SPDX-License-Identifier: Apache-2.0
"""From text to tokens and back: bytes, or the vocabulary of a `tokenizers` file.

The first tokens are reserved: 0 padding, 1 beginning, 2 end, 3 mask. A source of plain text may
reserve none, so that tokens are those of the file, or the bytes themselves.
"""

import os
import pathlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from attnjax.errors import RecipeError

PADDING, BEGIN, END, MASK = range(4)
RESERVED = 4
"""How many tokens are reserved in front of a vocabulary."""

BYTES = "bytes"
"""Name of the tokenizer that needs no file."""


class Tokenizer(Protocol):
    """What a source asks of a tokenizer."""

    vocab_size: int
    """Number of tokens, the reserved ones included."""

    def encode(self, text: bytes) -> np.ndarray:
        """Return int32 tokens `[t]` of text in UTF-8, without special ones."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens up to the first end; other reserved tokens are left out."""
        ...


class Bytes(Tokenizer):
    """Every byte is a token.

    Args:
      reserved: tokens before that of byte 0.
    """

    def __init__(self, reserved: int = RESERVED):
        self.reserved, self.vocab_size = reserved, 256 + reserved

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32) + self.reserved

    def decode(self, tokens: Iterable[int]) -> str:
        kept = [token - self.reserved for token in _own(tokens, self.reserved)]
        return bytes(byte for byte in kept if byte < 256).decode(errors="replace")


class TokenizerFile(Tokenizer):
    """A vocabulary in the JSON format of the library `tokenizers`, such as GPT-2's or BART's.

    Args:
      path: the file; `~` and environment variables are expanded.
      reserved: tokens before the file's first one. Special tokens of the file are not added.

    Raises:
      RecipeError: there is no such file, it is no tokenizer, or the library is not installed.
    """

    def __init__(self, path: str, reserved: int = RESERVED):
        file = pathlib.Path(os.path.expandvars(path)).expanduser()
        if not file.is_file():
            raise RecipeError(
                f"tokenizer={path!r}: must be {BYTES!r} or a tokenizer.json; no file {file}"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise RecipeError(
                f"tokenizer={path!r} needs the library tokenizers: pip install 'attnjax[text]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise RecipeError(f"tokenizer={path!r}: {error}") from error
        # Files may ask for padding or cutting; lengths are the source's own business.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.reserved = reserved
        self.vocab_size = self._tokenizer.get_vocab_size() + reserved

    def encode(self, text: bytes) -> np.ndarray:
        encoded = self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)
        return np.asarray(encoded.ids, np.int32) + self.reserved

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([t - self.reserved for t in _own(tokens, self.reserved)])


def make_tokenizer(name: str, reserved: int = RESERVED) -> Tokenizer:
    """Return a tokenizer.

    Args:
      name: "bytes", or the path of a `tokenizers` JSON file.
      reserved: tokens in front; 0 or `RESERVED`.

    Raises:
      RecipeError: there is no such file, or the number is another.
    """
    if reserved not in (0, RESERVED):
        raise RecipeError(f"source.reserved={reserved}: must be 0 or {RESERVED}")
    return Bytes(reserved) if name == BYTES else TokenizerFile(name, reserved)


def _own(tokens, reserved):
    """Return the tokens of the vocabulary proper, up to the first end."""
    kept = []
    for token in map(int, tokens):
        if reserved and token == END:
            break
        if token >= reserved:
            kept.append(token)
    return kept
