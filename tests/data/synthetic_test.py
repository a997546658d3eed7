# SPDX-License-Identifier: Apache-2.0
"""Data made on the fly: reproducible, disjoint splits, the right signal in the right place."""

import numpy as np
import pytest

from attnjax.data import synthetic
from attnjax.errors import RecipeError

SOURCES = (
    synthetic.InformationExchange,
    synthetic.InformationExchangeImages,
    synthetic.SyntheticImages,
)
ENOUGH = 0.99
"""Share of examples that the matched filter must decode; its theoretical error is far smaller."""


def same(left, right):
    return all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("source", SOURCES)
def test_examples_depend_on_seed_split_and_index_only(source):
    a, b = source(size=50), source(size=50)
    assert len(a) == 50
    forwards = [a[i] for i in range(5)]
    backwards = [b[i] for i in reversed(range(5))][::-1]
    assert all(same(x, y) for x, y in zip(forwards, backwards, strict=True))
    others = (a[6], source("test", size=50)[0], source(seed=1, size=50)[0])
    assert not any(same(a[0], other) for other in others)


@pytest.mark.parametrize("source", SOURCES)
def test_wrong_arguments_are_refused(source):
    with pytest.raises(RecipeError, match="split"):
        source("validation")
    with pytest.raises(RecipeError, match="size"):
        source(size=0)


def test_information_exchange_is_exactly_as_defined():
    source = synthetic.InformationExchange(size=400)
    fine_wave = np.sin(9 * np.linspace(-1, 1, 48))
    coarse_wave = np.sin(7 * np.linspace(1, -1, 192))
    bits, right, noise = [], 0, []
    for i in range(400):
        example = source[i]
        fine, coarse = example["fine"], example["coarse"]
        assert fine.shape == (16, 48) and coarse.shape == (4, 192)
        assert fine.dtype == coarse.dtype == np.float32 and example["label"].dtype == np.int32
        # Matched filter: the patch with the strongest response carries the bit in its sign.
        f, c = fine @ fine_wave, coarse @ coarse_wave
        a, b = f[np.abs(f).argmax()] > 0, c[np.abs(c).argmax()] > 0
        right += int(a ^ b) == example["label"]
        bits.append((a, b))
        noise.append(np.delete(fine, np.abs(f).argmax(), axis=0))
    assert right / 400 >= ENOUGH
    counts = np.unique(np.array(bits), axis=0, return_counts=True)[1]
    assert len(counts) == 4 and counts.min() > 60
    assert abs(np.std(noise) - 0.5) < 0.005 and abs(np.mean(noise)) < 0.005


def test_image_form_carries_one_bit_per_band():
    source = synthetic.InformationExchangeImages(size=200)
    cell = np.arange(48) // 2
    checker = 1.0 - 2.0 * ((cell[:, None] + cell[None, :]) % 2)
    right = 0
    for i in range(200):
        example = source[i]
        image = example["image"]
        assert image.shape == (48, 48, 3) and image.dtype == np.float32
        grey = image[..., 0]
        blocks = (grey * checker).reshape(4, 12, 4, 12).sum(axis=(1, 3)).ravel()
        a = blocks[np.abs(blocks).argmax()] > 0
        b = grey.sum() > 0
        right += int(a ^ b) == example["label"]
    assert right / 200 >= ENOUGH
    with pytest.raises(RecipeError, match="multiple of 12"):
        synthetic.InformationExchangeImages(pixels=50)


def test_synthetic_images_have_a_pattern_per_class():
    source = synthetic.SyntheticImages(size=30, pixels=32, classes=3)
    means = {}
    for i in range(30):
        example = source[i]
        assert example["image"].shape == (32, 32, 3) and example["image"].dtype == np.uint8
        coarse = example["image"].reshape(4, 8, 4, 8, 3).mean(axis=(1, 3))
        means.setdefault(int(example["label"]), []).append(coarse)
    assert set(means) == {0, 1, 2}
    for group in means.values():
        assert np.ptp(group, axis=0).max() < 20  # only the noise differs
    assert np.abs(means[0][0] - means[1][0]).max() > 40
