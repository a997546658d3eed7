# SPDX-License-Identifier: Apache-2.0
"""Text sources: the entropy is the one that is stated, files are cut and numbered exactly."""

import numpy as np
import pytest

from attnjax import data, recipe
from attnjax.data import BadRecord
from attnjax.data.text import MarkovText, StandardLibraryText, TextFiles, TokenFiles
from attnjax.errors import RecipeError


def test_texts_depend_on_seed_split_and_index_only():
    a, b = MarkovText(size=9), MarkovText(size=9)
    assert len(a) == 9
    for i in (3, 0, 8):
        np.testing.assert_array_equal(a[i]["tokens"], b[i]["tokens"])
    others = [a[4], MarkovText("test")[3], MarkovText(seed=1)[3]]
    assert all((x["tokens"] != a[3]["tokens"]).any() for x in others)
    assert a[3]["tokens"].dtype == np.int32 and a[3]["tokens"].shape == (128,)


@pytest.mark.parametrize("order", [1, 2])
def test_entropy_is_what_the_best_predictor_loses(order):
    """From the texts alone: counted transitions, and the mean loss under the true table."""
    source = MarkovText(symbols=4, order=order, length=20_000, size=4, concentration=1.0)
    tokens = np.concatenate([source[i]["tokens"] for i in range(4)]) - 97
    assert tokens.min() >= 0 and tokens.max() < 4
    context = np.zeros(len(tokens) - order, int)
    for lag in range(order):
        context = context * 4 + tokens[lag : len(tokens) - order + lag]
    counts = np.zeros((4**order, 4))
    np.add.at(counts, (context, tokens[order:]), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -np.sum(counts * np.log(np.maximum(share, 1e-12))) / counts.sum()
    assert entropy == pytest.approx(source.entropy, rel=0.02)


def test_texts_begin_in_the_stationary_distribution():
    source = MarkovText(symbols=3, length=2, size=4000, concentration=1.0)
    starts = np.array([source[i]["tokens"] for i in range(4000)]) - 97
    first, second = (np.bincount(starts[:, i], minlength=3) / 4000 for i in (0, 1))
    np.testing.assert_allclose(first, second, atol=0.03)


@pytest.mark.parametrize(
    "options",
    [{"split": "dev"}, {"size": 0}, {"length": 1}, {"symbols": 27}, {"order": 0},
     {"order": 20}, {"concentration": 0.0}],
    ids=str,
)  # fmt: skip
def test_impossible_chains_are_refused(options):
    with pytest.raises(RecipeError, match=f"source.{next(iter(options))}="):
        MarkovText(**options)


@pytest.fixture
def folder(tmp_path):
    for name, text in {"a.txt": b"abcdefg", "b/c.txt": b"hi\xff", "z.txt": b"0123456789"}.items():
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    (tmp_path / "train/notes.md").write_text("not text")
    return tmp_path


def test_files_are_cut_in_order_and_numbered(folder):
    source = TextFiles(str(folder), length=8)
    assert len(source) == 3
    rows = [source[i] for i in range(3)]
    text = np.concatenate([row["tokens"] for row in rows])
    assert bytes(text[:20].astype(np.uint8)) == b"abcdefghi\xff0123456789"
    assert [row["segments"].tolist() for row in rows] == [
        [1] * 7 + [2], [1, 1] + [2] * 6, [1] * 4 + [0] * 4,
    ]  # fmt: skip
    assert text[20:].tolist() == [0] * 4
    assert source.locate(1).endswith("b/c.txt") and source.locate(2).endswith("z.txt")


def test_files_become_batches(folder):
    section = recipe.Data(source={"name": "text_files", "root": str(folder), "length": 8})
    batch = next(data.eval_batches(section, batch=4))
    assert batch["tokens"].shape == (4, 8) and batch["segments"].dtype == np.int32
    assert batch["valid"].tolist() == [True] * 3 + [False]


def test_what_is_missing_is_named(folder):
    for root, split, message in (
        (folder / "nowhere", "train", "no folder"),
        (folder, "test", "no folder"),
        (folder / "train", "b/../../train/b/empty", "no folder"),
    ):
        with pytest.raises(RecipeError, match=message):
            TextFiles(str(root), split)
    (folder / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"no \.txt file"):
        TextFiles(str(folder), "empty")
    (folder / "train/void.txt").touch()
    with pytest.raises(RecipeError, match=r"void\.txt is empty"):
        TextFiles(str(folder))
    with pytest.raises(RecipeError, match="length=1"):
        TextFiles(str(folder), length=1)


def test_a_file_that_shrinks_is_a_bad_record(folder):
    section = recipe.Data(source={"name": "text_files", "root": str(folder), "length": 8})
    batches = data.eval_batches(section, batch=1)
    (folder / "train/z.txt").write_bytes(b"0")
    with pytest.raises(BadRecord, match=r"z\.txt is shorter"):
        list(batches)


def test_reserved_tokens_come_before_the_bytes(folder):
    source = TextFiles(str(folder), length=8, reserved=4)
    assert source.vocab_size == 260
    assert source[0]["tokens"].tolist() == [4 + byte for byte in b"abcdefgh"]


def test_the_handbook_of_python_is_english_and_held_out_by_topic():
    train, test = StandardLibraryText(length=1000), StandardLibraryText("test", length=1000)
    text = {}
    for split, source in (("train", train), ("test", test)):
        rows = np.concatenate([source[i]["tokens"] for i in range(len(source))])
        text[split] = bytes(rows.astype(np.uint8)).decode(errors="ignore")
    assert 0.02 < len(test) / len(train) < 0.2 and len(train) > 200
    assert text["train"].count(" the ") > 1000
    paragraphs = {split: set(text[split].strip("\0").split("\n\n")) for split in text}
    assert len(paragraphs["test"]) > 50
    # All that both have is the nothing behind their last paragraphs.
    assert paragraphs["train"] & paragraphs["test"] <= {""}
    np.testing.assert_array_equal(train[7]["tokens"], StandardLibraryText(length=1000)[7]["tokens"])
    shifted = StandardLibraryText(length=1000, reserved=4)
    np.testing.assert_array_equal(shifted[7]["tokens"], train[7]["tokens"] + 4)
    with pytest.raises(RecipeError, match="split='dev'"):
        StandardLibraryText("dev")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files_are_cut_in_order(dtype, tmp_path):
    (tmp_path / "train").mkdir()
    tokens = np.arange(11) + 60_000
    for name, part in (("b", tokens[7:]), ("a", tokens[:7])):
        part.astype(f"<{dtype[0]}{int(dtype[4:]) // 8}").tofile(tmp_path / f"train/{name}.bin")
    source = TokenFiles(str(tmp_path), length=4, dtype=dtype)
    assert len(source) == 3 and source.locate(0).endswith("a.bin")
    read = [source[i] for i in range(3)]
    assert np.concatenate([x["tokens"] for x in read])[:11].tolist() == tokens.tolist()
    assert read[1]["segments"].tolist() == [1, 1, 1, 2]
    assert read[2]["segments"].tolist() == [1, 1, 1, 0] and read[0]["tokens"].dtype == np.int32


def test_broken_token_files_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no \.bin file"):
        TokenFiles(str(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.bin").write_bytes(b"abc")
    with pytest.raises(RecipeError, match="3 bytes, which are no whole uint16"):
        TokenFiles(str(tmp_path))
    with pytest.raises(RecipeError, match=r"source\.dtype='int8'"):
        TokenFiles(str(tmp_path), dtype="int8")
