# SPDX-License-Identifier: Apache-2.0
"""Text to tokens and back: bytes, and files of the library tokenizers."""

import json
import sys

import numpy as np
import pytest

from attnjax.data.text import TextFiles
from attnjax.data.tokenizers import make_tokenizer
from attnjax.errors import RecipeError

WORDS = {"to": 0, "be": 1, "or": 2, "not": 3, "?": 4}


@pytest.fixture
def file(tmp_path):
    """A vocabulary of five words; it asks for padding, which sources must not get."""
    path = tmp_path / "tokenizer.json"
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 4, "pad_type_id": 0, "pad_token": "?"}  # fmt: skip
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": padding, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "?"},
    }))  # fmt: skip
    return path


def test_bytes_there_and_back():
    text = make_tokenizer("bytes")
    tokens = text.encode("naïve\n".encode())
    assert text.vocab_size == 260 and tokens.dtype == np.int32 and tokens.min() >= 4
    assert text.decode([1, *tokens, 3, 2, *tokens]) == "naïve\n"
    plain = make_tokenizer("bytes", reserved=0)
    assert plain.vocab_size == 256 and plain.encode(b"\x00\xff").tolist() == [0, 255]
    assert plain.decode([2, 65]) == "\x02A"


def test_what_is_no_tokenizer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"must be 'bytes' or a tokenizer\.json"):
        make_tokenizer("byte")
    with pytest.raises(RecipeError, match="reserved=3"):
        make_tokenizer("bytes", reserved=3)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RecipeError, match=r"attnjax\[text\]"):
        make_tokenizer(str(path))


def test_files_of_the_library(file):
    pytest.importorskip("tokenizers")
    text = make_tokenizer(str(file))
    assert text.vocab_size == 9
    assert text.encode(b"to be or not").tolist() == [4, 5, 6, 7]
    assert text.decode([1, 4, 5, 2, 6]) == "to be"
    file.write_text("{}")
    with pytest.raises(RecipeError, match="tokenizer="):
        make_tokenizer(str(file))


def test_books_are_tokenised_once(file, tmp_path):
    pytest.importorskip("tokenizers")
    for name, words in {"a.txt": "to be or", "b.txt": "not to be"}.items():
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_text(words)
    make = lambda: TextFiles(str(tmp_path), length=4, tokenizer=str(file), reserved=4)
    source = make()
    assert source.vocab_size == 9 and len(source) == 2
    assert source[0]["tokens"].tolist() == [4, 5, 6, 7]
    assert source[0]["segments"].tolist() == [1, 1, 1, 2]
    assert source[1]["tokens"].tolist() == [4, 5, 0, 0]
    kept = sorted((tmp_path / ".tokens").rglob("*.npy"))
    assert [path.name for path in kept] == ["a.npy", "b.npy"]
    np.save(kept[0], np.array([7, 7, 7], np.int32))
    assert make()[0]["tokens"].tolist() == [7, 7, 7, 7]
