# SPDX-License-Identifier: Apache-2.0
"""Pairs of pictures: what they hold, SR3's folders and their faults, the pipeline."""

import numpy as np
import pytest
from PIL import Image

from attnjax.data import pictures
from attnjax.data.records import BadRecord, read
from attnjax.errors import RecipeError


def picture(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    """Three pictures as SR3's preparation writes them."""
    for i in range(3):
        high = picture(32, i)
        low = Image.fromarray(high).resize((8, 8), Image.Resampling.BICUBIC)
        made = {
            "hr_32": Image.fromarray(high), "lr_8": low,
            "sr_8_32": low.resize((32, 32), Image.Resampling.BICUBIC),
        }  # fmt: skip
        for folder, image in made.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f"{i:05d}.png")
    return tmp_path


def folders(root, **options):
    return pictures.PictureFolders(str(root), small=8, large=32, **options)


def test_folders(root):
    source = folders(root)
    assert len(source) == 3 and len(folders(root, limit=2)) == 2
    assert source.locate(1).endswith("hr_32/00001.png")
    for i in range(3):
        expected = pictures.pair(picture(32, i), 8)
        for name, array in source[i].items():
            np.testing.assert_array_equal(array, expected[name])
    # Without the enlarged pictures the small ones are enlarged; without these, nothing is missing.
    before = source[2]
    for gone in ("sr_8_32", "lr_8"):
        (root / gone).rename(root / "away")
        np.testing.assert_array_equal(folders(root)[2]["low"], before["low"])
        (root / "away").rename(root / gone)


def test_faults_of_the_layout(root, tmp_path):
    with pytest.raises(RecipeError, match=r"expected .*hr_32 and .*sr_8_32 .* there is no folder"):
        folders(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"hr_64 and .*found hr_32, lr_8, sr_8_32 in"):
        pictures.PictureFolders(str(root), small=8, large=64)
    with pytest.raises(RecipeError, match="small=32, large=8"):
        pictures.PictureFolders(str(root), small=32, large=8)
    with pytest.raises(RecipeError, match="limit=-1"):
        folders(root, limit=-1)
    with pytest.raises(RecipeError, match="on_error"):
        folders(root, on_error="ignore")
    (root / "lr_8/00002.png").rename(root / "lr_8/2.png")
    with pytest.raises(RecipeError, match=r"hr_32 lacks 1 of the pictures in .*lr_8: 2.png"):
        folders(root)
    (root / "lr_8/2.png").unlink()
    with pytest.raises(RecipeError, match=r"lr_8 lacks 1 of the pictures in .*hr_32: 00002.png"):
        folders(root)
    for path in (root / "lr_8").iterdir():
        path.unlink()
    with pytest.raises(RecipeError, match=r"lr_8: no PNG file in it"):
        folders(root)


def test_faults_of_pictures(root):
    """A wrong size and a damaged file name the file; a tolerant source takes the next one."""
    Image.fromarray(picture(16)).save(root / "sr_8_32/00000.png")
    (root / "hr_32/00001.png").write_bytes(b"no picture")
    take = lambda source, i: read(source, pictures.PicturePairs(), i, lambda: None)
    with pytest.raises(BadRecord, match=r"sr_8_32/00000.png is 16x16, expected 32x32"):
        take(folders(root), 0)
    with pytest.raises(BadRecord, match=r"hr_32/00001.png"):
        take(folders(root), 1)
    example, index = take(folders(root, on_error="skip"), 0)
    assert index == 2 and example["high"].shape == (32, 32, 3)


def test_digits():
    train, test = pictures.DigitPairs(), pictures.DigitPairs("test")
    assert (len(train), len(test)) == (1437, 360)
    first = train[0]
    assert {name: x.shape for name, x in first.items()} == dict.fromkeys(("low", "high"), (8, 8, 1))
    assert first["low"].dtype == np.uint8
    # Nothing but sixteen numbers is left of the picture.
    image = Image.fromarray(first["high"][..., 0]).resize((4, 4), Image.Resampling.BICUBIC)
    again = image.resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(first["low"][..., 0], np.asarray(again))


def test_photographs():
    train, test = pictures.PhotoPairs(), pictures.PhotoPairs("test")
    assert (len(train), len(test)) == (2 * 23 * 25, 2 * 6 * 3)
    for source in (train, test):
        for i in (0, len(source) - 1):
            assert {x.shape for x in source[i].values()} == {(64, 64, 3)}
    assert max(column + 64 for _, _, column in train._places) <= min(c for *_, c in test._places)
    for options in ({"small": 64}, {"large": 512}, {"stride": 0}):
        with pytest.raises(RecipeError, match="must be positive, small below large"):
            pictures.PhotoPairs(**options)
    with pytest.raises(RecipeError, match=r"source.split='val'"):
        pictures.PhotoPairs("val")


def test_pipeline():
    example = pictures.pair(picture(8), 4) | {"label": 3}
    plain = pictures.PicturePairs()
    assert not plain.random and pictures.PicturePairs(flip=0.5).random
    out = plain(example)
    assert set(out) == {"low", "high"}
    for name, array in out.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        np.testing.assert_allclose(array, example[name] / 127.5 - 1, atol=1e-6)
    always, rng = pictures.PicturePairs(flip=1.0), np.random.default_rng(0)
    for name, array in always(example, rng).items():
        np.testing.assert_array_equal(array, out[name][:, ::-1])
    # Evaluation passes no generator.
    np.testing.assert_array_equal(always(example)["high"], out["high"])
    sides = [pictures.PicturePairs(flip=0.5)(example, rng) for _ in range(200)]
    flipped = [not np.array_equal(s["high"], out["high"]) for s in sides]
    assert 60 < sum(flipped) < 140
    assert all(
        np.array_equal(s["low"], out["low"][:, ::-1] if f else out["low"])
        for s, f in zip(sides, flipped, strict=True)
    )
    with pytest.raises(RecipeError, match=r"pipeline.flip=2"):
        pictures.PicturePairs(flip=2)
