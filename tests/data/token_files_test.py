# SPDX-License-Identifier: Apache-2.0
"""Flat files of tokens and lines of JSON."""

import json

import numpy as np
import pytest

from attnjax.data.token_files import JsonLines, PackedTokens, pack, read_lines
from attnjax.data.tokenizers import make_tokenizer
from attnjax.errors import RecipeError

TEXTS = ["one", "", "three and more", "vier \u2014 \u4e2d\u6587"]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_packed_tokens_are_cut_into_windows_with_their_documents(tmp_path, dtype):
    tokens = np.array([5, 6, 7, 2, 8, 2, 9, 10, 11, 12, 13], dtype)
    tokens.tofile(tmp_path / "train.bin")
    source = PackedTokens(str(tmp_path), length=4, dtype=dtype, end=2)
    assert len(source) == 3
    rows = [source[i] for i in range(3)]
    assert [row["tokens"].tolist() for row in rows] == [
        [5, 6, 7, 2], [8, 2, 9, 10], [11, 12, 13, 0]
    ]  # fmt: skip
    assert [row["segments"].tolist() for row in rows] == [
        [1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 0]
    ]  # fmt: skip
    whole = PackedTokens(str(tmp_path), length=4, dtype=dtype)
    assert whole[1]["segments"].tolist() == [1, 1, 1, 1]


def test_files_of_a_folder_follow_each_other(tmp_path):
    (tmp_path / "train").mkdir()
    tokens = np.arange(11) + 60_000
    for name, part in (("b", tokens[7:]), ("a", tokens[:7])):
        part.astype(np.uint16).tofile(tmp_path / f"train/{name}.bin")
    source = PackedTokens(str(tmp_path), length=4)
    assert len(source) == 3 and source.locate(0).endswith("a.bin")
    assert source.locate(2).endswith("b.bin")
    read = [source[i] for i in range(3)]
    assert np.concatenate([x["tokens"] for x in read])[:11].tolist() == tokens.tolist()
    assert read[1]["segments"].tolist() == [1, 1, 1, 2] and read[0]["tokens"].dtype == np.int32
    cut = PackedTokens(str(tmp_path), length=4, end=60_008)
    assert [x["segments"].tolist() for x in (cut[1], cut[2])] == [[1, 1, 1, 2], [1, 2, 2, 0]]
    assert cut[2]["tokens"].tolist() == [60_008, 60_009, 60_010, 0]


def test_packing_is_undone_by_reading(tmp_path):
    tokenizer = make_tokenizer("bytes", 4)
    count = pack(TEXTS, tmp_path / "val.bin", tokenizer, 2, "uint16")
    assert count == sum(len(text.encode()) + 1 for text in TEXTS)
    source = PackedTokens(str(tmp_path), "val", length=64, end=2)
    row = source[0]
    for number, text in enumerate(TEXTS, 1):
        own = row["tokens"][row["segments"] == number]
        assert own[-1] == 2 and tokenizer.decode(own[:-1]) == text
    with pytest.raises(RecipeError, match="token 70000 does not fit dtype='uint16'"):
        pack(["a"], tmp_path / "wrong.bin", tokenizer, 70_000, "uint16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val.bin"]


def lines(texts):
    return "".join(json.dumps({"text": text, "meta": 1}) + "\n" for text in texts)


def test_json_lines_are_tokenised_once(tmp_path):
    folder = tmp_path / "train" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text(lines(TEXTS[2:]))
    (folder / "a.jsonl").write_text(lines(TEXTS[:2]) + "\n")
    source = JsonLines(str(tmp_path), length=64)
    tokenizer = make_tokenizer("bytes", 4)
    row = source[0]
    found = [row["tokens"][row["segments"] == n][:-1] for n in range(1, 5)]
    assert [tokenizer.decode(tokens) for tokens in found] == TEXTS
    kept = tmp_path / ".tokens" / "train-bytes-4.bin"
    before = kept.stat().st_mtime_ns
    again = JsonLines(str(tmp_path), length=64)
    assert kept.stat().st_mtime_ns == before and again.vocab_size == 260
    np.testing.assert_array_equal(again[0]["tokens"], row["tokens"])


def test_compressed_lines_are_the_same(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "part.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(lines(TEXTS).encode()))
    assert list(read_lines(path)) == TEXTS


def test_faulty_files_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.bin").write_bytes(b"123")
    (tmp_path / "empty.bin").write_bytes(b"")
    for make, message in (
        (lambda: PackedTokens(str(tmp_path)), "3 bytes, must be a multiple of 2"),
        (lambda: PackedTokens(str(tmp_path), "empty"), "0 bytes"),
        (lambda: PackedTokens(str(tmp_path), "val"), r"no file .*val\.bin \(there: .*train\.bin"),
        (lambda: PackedTokens(str(tmp_path), dtype="int8"), r"source\.dtype='int8'"),
        (lambda: PackedTokens(str(tmp_path), length=1), r"source\.length=1"),
        (lambda: JsonLines(str(tmp_path)), r"no \.jsonl or \.jsonl\.zst file"),
        (lambda: JsonLines(str(tmp_path), reserved=0), r"source\.reserved=0"),
    ):
        with pytest.raises(RecipeError, match=message):
            make()
    bad = tmp_path / "train" / "bad.jsonl"
    for text, line in (('{"text": "a"}\n{"text": 1}\n', 2), ('{"body": "b"}\n', 1), ("{\n", 1)):
        bad.write_text(text)
        with pytest.raises(RecipeError, match=rf"bad\.jsonl:{line}: no JSON object"):
            list(read_lines(bad))
