# SPDX-License-Identifier: Apache-2.0
"""Image transforms: geometry, statistics, and that the generator is the only randomness."""

import numpy as np
import pytest
from PIL import Image

from attnjax.data import transforms
from attnjax.errors import RecipeError

F32 = 1e-6
"""Rounding of a handful of float32 operations on values of order one."""


def generator(seed=0):
    return np.random.default_rng(seed)


def ramp(width=40, height=30):
    """Red counts columns, green counts rows."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(image)


def test_normalise_is_the_textbook_formula():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    expected = (image / 255 - transforms.IMAGENET_MEAN) / transforms.IMAGENET_STD
    result = transforms.normalise(Image.fromarray(image))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=3 * F32)
    white = transforms.normalise(Image.new("RGB", (1, 1), (255, 255, 255)))
    np.testing.assert_allclose(white[0, 0], [2.2489083, 2.4285715, 2.64], atol=3 * F32)


@pytest.mark.parametrize(
    ("size", "resized"),
    [((400, 300), (365, 274)), ((300, 400), (274, 365)), ((274, 274), (274, 274))],
)
def test_resize_shorter_side(size, resized):
    assert transforms.resize_shorter(Image.new("RGB", size), 274).size == resized


def test_centre_crop():
    crop = np.asarray(transforms.centre_crop(ramp(40, 30), 10))
    assert crop.shape == (10, 10, 3)
    assert crop[0, 0].tolist() == [15, 10, 0] and crop[-1, -1].tolist() == [24, 19, 0]
    padded = np.asarray(transforms.centre_crop(Image.new("RGB", (4, 4), (9, 9, 9)), 8))
    assert padded.sum() == 4 * 4 * 3 * 9


def test_random_resized_crop_covers_the_stated_area_and_aspect():
    boxes = [
        transforms._random_box(400, 300, generator(i), (0.08, 1.0), (3 / 4, 4 / 3))
        for i in range(2000)
    ]
    w = np.array([right - left for left, _, right, _ in boxes])
    h = np.array([bottom - top for _, top, _, bottom in boxes])
    left, top = (np.array([box[i] for box in boxes]) for i in (0, 1))
    share = w * h / (400 * 300)
    assert share.min() > 0.079 and share.max() <= 1.0 and share.min() < 0.1 and share.max() > 0.95
    assert (w / h).min() > 0.74 and (w / h).max() < 1.35
    assert left.min() == 0 and top.min() == 0 and (left + w).max() == 400 and (top + h).max() == 300


def test_random_resized_crop_falls_back_to_the_centre():
    box = transforms._random_box(1000, 10, generator(), (1.0, 1.0), (3 / 4, 4 / 3))
    assert box == (493, 0, 506, 10)
    image = transforms.random_resized_crop(Image.new("RGB", (1, 50)), 8, generator())
    assert image.size == (8, 8)


def test_crop_of_a_whole_image_is_pils_bicubic():
    image = ramp(30, 30)
    crop = transforms.random_resized_crop(
        image, 20, generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0)
    )
    assert crop == image.resize((20, 20), Image.Resampling.BICUBIC)


def test_flip():
    image = ramp()
    assert transforms.random_flip(image, 0.0, generator()) == image
    assert np.asarray(transforms.random_flip(image, 1.0, generator()))[0, 0, 0] == 39
    flips = sum(transforms.random_flip(image, 0.5, generator(i)) != image for i in range(400))
    assert 150 < flips < 250


def test_jitter_of_no_strength_changes_nothing():
    image = ramp()
    assert transforms.colour_jitter(image, 0.0, generator()) == image
    assert transforms.colour_jitter(image, 0.4, generator()) != image


def test_affine_without_range_is_the_identity_and_shifts_move():
    image = ramp()
    assert transforms.random_affine(image, generator()) == image
    point = np.zeros((40, 40), np.uint8)
    point[20, 20] = 255
    moved = np.asarray(
        transforms.random_affine(Image.fromarray(point), generator(3), shift=0.2), float
    )
    y, x = np.array(np.nonzero(moved)) @ moved[np.nonzero(moved)] / moved.sum()
    rng = generator(3)
    rng.uniform(0, 0)
    dx, dy = rng.uniform(-0.2, 0.2) * 40, rng.uniform(-0.2, 0.2) * 40
    np.testing.assert_allclose([x - 20, y - 20], [dx, dy], atol=0.05)


def test_rotation_turns_about_the_centre():
    stripe = np.zeros((41, 41), np.uint8)
    stripe[20] = 255
    turned = np.asarray(
        transforms.random_affine(Image.fromarray(stripe), generator(1), rotation=90.0), float
    )
    y, x = np.nonzero(turned > 100)
    angle = abs(generator(1).uniform(-90, 90))
    measured = np.degrees(np.arctan2(np.ptp(y), np.ptp(x)))
    assert abs(measured - angle) < 4
    assert turned[20, 20] > 200


def test_erase_pixel_mode_writes_unit_noise_into_one_rectangle():
    shares, values = [], []
    for seed in range(300):
        array = np.full((32, 32, 3), 7.0, np.float32)
        out = transforms.random_erase(array, 1.0, generator(seed))
        assert out is array
        changed = np.any(out != 7.0, axis=-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all() and box.sum() == changed.sum()
        shares.append(changed.mean())
        values.append(out[changed].ravel())
    assert min(shares) > 0.01 and max(shares) < 0.36
    values = np.concatenate(values)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01


def test_erase_probability_and_modes():
    hits = 0
    for seed in range(400):
        array = np.full((16, 16, 3), 7.0, np.float32)
        hits += bool(np.any(transforms.random_erase(array, 0.25, generator(seed)) != 7.0))
    assert 70 < hits < 130
    array = transforms.random_erase(
        np.full((16, 16, 3), 7.0, np.float32), 1.0, generator(), mode="colour"
    )
    assert len(np.unique(array.reshape(-1, 3), axis=0)) == 2
    array = transforms.random_erase(
        np.full((16, 16, 3), 7.0, np.float32), 1.0, generator(), mode="zero"
    )
    assert set(np.unique(array)) == {0.0, 7.0}


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
def test_to_rgb(shape):
    image = transforms.to_rgb(np.full(shape, 200, np.uint8))
    assert image.mode == "RGB" and image.size == (5, 4)


def test_to_rgb_refuses_floats():
    with pytest.raises(ValueError, match="float64"):
        transforms.to_rgb(np.zeros((4, 4, 3)))


def test_unknown_interpolation():
    with pytest.raises(RecipeError, match="did you mean 'bicubic'"):
        transforms.interpolation("bicubik")
