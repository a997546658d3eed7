# SPDX-License-Identifier: Apache-2.0
"""Pipelines: output contract, options, evaluation geometry."""

import inspect

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from attnjax import registry
from attnjax.data import pipelines, transforms
from attnjax.errors import RecipeError

MAX_ARGUMENTS = 16


def example(width=100, height=80):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return {"image": image, "label": np.int64(3), "file_name": b"x.jpg"}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "pipeline",
    [
        pipelines.ImageTrain(32),
        pipelines.ImageTrain(32, rand_augment=""),
        pipelines.ImageTrain(32, scale=(0.5, 1), flip=0, erase=1.0, interpolation="bilinear"),
        pipelines.ImageEval(32),
        pipelines.SmallImages(32, shift=0.1, rotation=10),
    ],
)
def test_output_contract(pipeline):
    result = pipeline(example(), rng())
    assert result.keys() == {"image", "label"}
    assert result["image"].dtype == np.float32 and result["image"].shape == (32, 32, 3)
    assert result["label"].dtype == np.int32 and result["label"] == 3
    again = pipeline(example(), rng())
    np.testing.assert_array_equal(result["image"], again["image"])
    other = pipeline(example(), rng(1))
    assert np.array_equal(result["image"], other["image"]) != pipeline.random


def test_sources_are_not_written_to():
    original = example()
    before = original["image"].copy()
    for seed in range(20):
        pipelines.ImageTrain(16, erase=1.0)(original, rng(seed))
    np.testing.assert_array_equal(original["image"], before)


@pytest.mark.parametrize(
    ("size", "ratio", "resized"), [(224, 0.875, 256), (240, 0.875, 274), (408, 1.0, 408)]
)
def test_evaluation_geometry(size, ratio, resized):
    """resize int(256 / 224 * size), bicubic, centre crop, as the published numbers were made."""
    photo = datasets.load_sample_image("china.jpg")
    result = pipelines.ImageEval(size, crop_ratio=ratio)({"image": photo, "label": 0})["image"]
    long = resized * 640 // 427
    image = Image.fromarray(photo).resize((long, resized), Image.Resampling.BICUBIC)
    left, top = round((long - size) / 2), round((resized - size) / 2)
    expected = np.asarray(image.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(result, transforms.normalise(Image.fromarray(expected)))


def test_training_needs_randomness_and_evaluation_none():
    with pytest.raises(RecipeError, match="image_eval"):
        pipelines.ImageTrain(16)(example(), None)
    pipelines.ImageEval(16)(example(), None)


def test_digits_are_enlarged_and_kept_in_place_without_randomness():
    digit = {"image": np.zeros((8, 8, 1), np.uint8), "label": 7}
    digit["image"][2:6, 2:6] = 255
    plain = pipelines.SmallImages(48, shift=0.2, rotation=20)(digit, None)["image"]
    assert plain.shape == (48, 48, 3) and plain[24, 24, 0] == 1.0 and plain[0, 0, 0] == -1.0
    np.testing.assert_array_equal(plain[..., 0], plain[..., 2])


def test_arrays_pass_through_in_readable_types():
    result = pipelines.Arrays()(
        {
            "a": np.zeros(3),
            "b": np.int64(4),
            "c": np.zeros(2, np.uint8),
            "d": True,
            "e": b"text",
        }
    )
    assert {k: v.dtype for k, v in result.items()} == {
        "a": np.float32,
        "b": np.int32,
        "c": np.uint8,
        "d": np.bool_,
    }
    with pytest.raises(RecipeError, match="numeric"):
        pipelines.Arrays()({"text": b"x"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "pipeline.size"),
        ({"interpolation": "cubic"}, "pipeline.interpolation"),
        ({"flip": 1.5}, "pipeline.flip"),
        ({"erase": -0.1}, "pipeline.erase"),
        ({"erase_mode": "pixels"}, "did you mean 'pixel'"),
        ({"scale": (1.0, 0.1)}, "pipeline.scale"),
        ({"ratio": (1.0,)}, "pipeline.ratio"),
        ({"rand_augment": "m9"}, "pipeline.rand_augment"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        pipelines.ImageTrain(**arguments)


def test_crop_ratio_is_a_share():
    with pytest.raises(RecipeError, match="crop_ratio"):
        pipelines.ImageEval(crop_ratio=1.5)


@pytest.mark.parametrize("table", ["source", "pipeline"])
def test_registered_classes_exist_with_small_argument_lists(table):
    for name in registry.TABLES[table]:
        target = registry.resolve(table, name)
        assert len(inspect.signature(target).parameters) <= MAX_ARGUMENTS
