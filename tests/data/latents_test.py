# SPDX-License-Identifier: Apache-2.0
"""Latents from files: both layouts, compressed or not, several files, and bad ones."""

import pickle

import numpy as np
import pytest

from attnjax import registry
from attnjax.data.latents import LatentFiles
from attnjax.data.pictures import Pictures
from attnjax.errors import RecipeError


def write(path, n, seed, save=np.savez, dtype=np.float16, **more):
    rng = np.random.default_rng(seed)
    arrays = {
        "latents": rng.standard_normal((n, 4, 3, 2)).astype(dtype),
        "labels": rng.integers(5, size=n),
    } | more
    save(path, **arrays)
    return arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_a_folder_in_order(tmp_path, save):
    first = write(tmp_path / "a.npz", 3, 0, save)
    second = write(tmp_path / "b.npz", 2, 1, save, extra=np.zeros(3))
    data = LatentFiles(str(tmp_path), scale=0.5, num_classes=5)
    assert len(data) == 5 and data.num_classes == 5
    expected = np.concatenate([first["latents"], second["latents"]]).astype(np.float32) * 0.5
    labels = np.concatenate([first["labels"], second["labels"]])
    for i in range(5):
        np.testing.assert_array_equal(data[i]["image"], expected[i])
        assert data[i]["label"] == labels[i] and data[i]["label"].dtype == np.int32
    assert data.locate(3) == f"{tmp_path / 'b.npz'} row 0"
    assert isinstance(data._latents[0], np.memmap) == (save is np.savez)


def test_channels_first_and_mirrors(tmp_path):
    made = write(tmp_path / "a.npz", 2, 0, latents=np.asfortranarray(np.ones((2, 4, 3, 2))) * 2)
    made["latents"][1, 3, 2, 1] = 7
    np.savez(tmp_path / "a.npz", **made)
    data = registry.resolve("source", "latent_files")(str(tmp_path / "a.npz"), channels_first=True)
    image = data[1]["image"]
    assert image.shape == (3, 2, 4) and image[2, 1, 3] == 7 and image.flags.c_contiguous
    mirrored = Pictures(flip=1.0)(data[1], np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored["image"], image[:, ::-1])
    np.testing.assert_array_equal(Pictures(flip=1.0)(data[1])["image"], image)


def test_pixels_are_scaled_and_enlarged():
    pipeline = Pictures(size=16)
    image = np.full((8, 8, 1), 255, np.uint8)
    out = pipeline({"image": image, "label": 3, "other": "x"})
    assert out["image"].shape == (16, 16, 1) and set(out) == {"image", "label"}
    np.testing.assert_allclose(out["image"], 1, rtol=1e-6)
    np.testing.assert_array_equal(Pictures()({"image": image * 0, "label": 3})["image"], -1)
    for options, message in (({"flip": 2.0}, "flip=2.0"), ({"size": -1}, "size=-1")):
        with pytest.raises(RecipeError, match=message):
            Pictures(**options)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(RecipeError, match=r"no \.npz file there"):
        LatentFiles(str(path))
    for more, message in (
        ({"latents": np.zeros((3, 4))}, r"a.npz: latents are float64\[3, 4\]"),
        ({"latents": np.zeros((3, 4, 3, 2), int)}, "latents are int64"),
        ({"labels": np.zeros(2, int)}, r"labels are int64\[2\], expected 3 integers"),
        ({"labels": np.zeros(3)}, "labels are float64"),
        ({"labels": np.array([0, 5, 1])}, "labels reach from 0 to 5, source.num_classes=5"),
        ({"labels": np.array([None] * 3)}, "holds objects"),
    ):
        write(path, 3, 0, **more)
        with pytest.raises(RecipeError, match=message):
            LatentFiles(str(path), num_classes=5)
    np.savez(path, latents=np.zeros((1, 2, 2, 1)))
    with pytest.raises(RecipeError, match="lacks labels, holds latents"):
        LatentFiles(str(path))
    write(path, 3, 0)
    np.savez(tmp_path / "b.npz", latents=np.zeros((1, 2, 2, 1)), labels=np.zeros(1, int))
    with pytest.raises(RecipeError, match="alike in all files"):
        LatentFiles(str(tmp_path))
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(RecipeError, match=r"not readable as \.npz"):
        LatentFiles(str(path))
