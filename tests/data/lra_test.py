# SPDX-License-Identifier: Apache-2.0
"""Readers of the Long Range Arena on files written here, and their complaints."""

import numpy as np
import pytest
from PIL import Image

from attnjax.data import lra
from attnjax.data.records import BadRecord, read
from attnjax.errors import RecipeError


def example(source, index):
    return read(source, lambda x, _: x, index, lambda: None)[0]


def test_listops(tmp_path):
    (tmp_path / "basic_train.tsv").write_text(
        "Source\tTarget\n( ( [MAX 2 ) 9 ] )\t9\n[SM 5 x ]\t5\n[MIN 1 2 ]\tten\nno target\n"
    )
    source = lra.LraListOps(str(tmp_path), length=6)
    assert len(source) == 4
    first = example(source, 0)
    assert first["tokens"].tolist() == [12, 3, 10, 15, 0, 0] and first["label"] == 9
    for index, message in ((1, "unknown token 'x'"), (2, "'ten' is no digit"), (3, "1 columns")):
        with pytest.raises(BadRecord, match=rf"basic_train.tsv:{index + 2}.*{message}"):
            example(source, index)
    (tmp_path / "basic_val.tsv").write_text("Sorce\tTarget\n")
    with pytest.raises(RecipeError, match=r"basic_val.tsv:1: no column 'Source'"):
        lra.LraListOps(str(tmp_path), "val")
    with pytest.raises(RecipeError, match=r"no file .*basic_test.tsv: did you mean 'basic_"):
        lra.LraListOps(str(tmp_path), "test")


def test_text(tmp_path):
    for name, text in (("pos", "good"), ("neg", "bad film")):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0_1.txt").write_text(text)
    source = lra.LraText(str(tmp_path), length=6)
    assert [int(example(source, i)["label"]) for i in (0, 1)] == [0, 1]
    assert example(source, 0)["tokens"].tolist() == [1 + byte for byte in b"bad fi"]
    assert example(source, 1)["tokens"].tolist() == [1 + byte for byte in b"good"] + [0, 0]
    assert source.locate(1).endswith("pos/0_1.txt")
    with pytest.raises(RecipeError, match=r"no \*.txt in .*test/neg"):
        lra.LraText(str(tmp_path), "test")


def test_retrieval(tmp_path):
    path = tmp_path / "new_aan_pairs.eval.tsv"
    path.write_text("1.0\ta\tb\tone\ttwo words\n2\ta\tb\tx\ty\n0\ta\tb\tx\n")
    source = lra.LraRetrieval(str(tmp_path), "eval", length=5)
    first = example(source, 0)
    assert first["tokens"].shape == (2, 5) and first["label"] == 1
    assert first["tokens"][1].tolist() == [1 + byte for byte in b"two w"]
    with pytest.raises(BadRecord, match=r"eval.tsv:2: label '2' is neither"):
        example(source, 1)
    with pytest.raises(BadRecord, match=r"eval.tsv:3: 4 columns"):
        example(source, 2)


@pytest.mark.parametrize("as_array", [False, True])
def test_pathfinder(tmp_path, as_array):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "imgs/0").mkdir(parents=True)
    lines = [f"imgs/0 sample_{i}.png {i} {i % 2} 0 1 2" for i in range(10)]
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for i in range(10):
        Image.fromarray(pixels).save(tmp_path / f"imgs/0/sample_{i}.png")
    file = tmp_path / "metadata/1.npy"
    if as_array:
        np.save(file, np.array([line.split() for line in lines]))
    else:
        file.write_text("\n".join(lines) + "\n")
    sizes = [len(lra.LraPathfinder(str(tmp_path), s, side=16)) for s in ("train", "val", "test")]
    assert sizes == [8, 1, 1]
    found = example(lra.LraPathfinder(str(tmp_path), "test", side=16), 0)
    assert found["label"] == 1 and found["values"].shape == (256, 1)
    np.testing.assert_allclose(found["values"][:, 0] * 255, np.arange(256), atol=1e-4)
    with pytest.raises(BadRecord, match=r"sample_0.png.*expected side 32"):
        example(lra.LraPathfinder(str(tmp_path), "train"), 0)
    (tmp_path / "metadata/2.npy").write_text("imgs/0 sample_0.png 0 1\nimgs/0 sample_1.png\n")
    with pytest.raises(RecipeError, match=r"2.npy:2: expected 'folder file number label'"):
        lra.LraPathfinder(str(tmp_path))


def test_pickled_metadata_is_refused(tmp_path):
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "metadata/1.npy", np.array([{"a": 1}], object))
    with pytest.raises(RecipeError, match=r"1.npy: .*allow_pickle"):
        lra.LraPathfinder(str(tmp_path))


def test_images(tmp_path):
    record = np.zeros(3073, np.uint8)
    record[0], record[1:1025], record[1025:2049], record[2049:] = 7, 100, 50, 200
    record.tofile(tmp_path / "test_batch.bin")
    found = example(lra.LraImage(str(tmp_path), "test"), 0)
    assert found["label"] == 7 and found["tokens"].shape == (1024,)
    assert set(found["tokens"].tolist()) == {1 + round(0.299 * 100 + 0.587 * 50 + 0.114 * 200)}
    with pytest.raises(RecipeError, match=r"no file .*data_batch_1.bin"):
        lra.LraImage(str(tmp_path))
    (tmp_path / "test_batch.bin").write_bytes(b"abc")
    with pytest.raises(RecipeError, match="3 bytes are no records"):
        lra.LraImage(str(tmp_path), "test")


@pytest.mark.parametrize("steps", [64, 1024])
def test_digits_as_sequences(steps):
    source = lra.DigitSequences("test", steps=steps)
    found = example(source, 3)
    assert found["values"].shape == (steps, 1) and found["values"].min() >= 0
    assert found["values"].max() <= 1
    small = example(lra.DigitSequences("test"), 3)["values"].reshape(8, 8)
    side = int(steps**0.5)
    np.testing.assert_array_equal(
        found["values"].reshape(side, side)[:: side // 8, :: side // 8], small
    )
    with pytest.raises(RecipeError, match="must be 64 or 1024"):
        lra.DigitSequences(steps=100)


def test_text_bytes(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)))
    source = lra.TextBytes(str(path), length=16, stride=8)
    assert len(source) == (90 - 16) // 8 + 1
    assert example(source, 2)["tokens"].tolist() == list(range(17, 33))
    assert example(lra.TextBytes(str(path), "test", length=10), 0)["tokens"][0] == 91
    with pytest.raises(RecipeError, match="leaves 10 bytes for test"):
        lra.TextBytes(str(path), "test", length=16)
    with pytest.raises(RecipeError, match="cannot be read"):
        lra.TextBytes(str(tmp_path / "none"))
    bundled = lra.TextBytes(length=128)
    assert len(bundled) > 200
