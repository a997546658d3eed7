# SPDX-License-Identifier: Apache-2.0
"""RandAugment: the scale of every operation and the meaning of "increasing"."""

import numpy as np
import pytest
from PIL import Image

from attnjax.data.randaugment import Canvas, RandAugment
from attnjax.errors import RecipeError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8))
INCREASING = RandAugment(increasing=True)
DECREASING = RandAugment(increasing=False)


def run(name, level, sign=1.0, augment=INCREASING, image=IMAGE):
    return np.asarray(augment.operations[name](image, level / 10, sign, augment.canvas))


def grey(value):
    return Image.new("RGB", (1, 1), (value,) * 3)


def test_fifteen_operations():
    assert list(INCREASING.operations) == list(DECREASING.operations)
    assert len(INCREASING.operations) == 15


@pytest.mark.parametrize(
    "name",
    [
        "rotate",
        "colour",
        "contrast",
        "brightness",
        "sharpness",
        "shear_x",
        "shear_y",
        "shift_x",
        "shift_y",
        "solarise",
        "solarise_add",
    ],
)
def test_level_zero_changes_nothing(name):
    np.testing.assert_array_equal(run(name, 0), np.asarray(IMAGE))


@pytest.mark.parametrize(
    "name",
    ["colour", "contrast", "brightness", "sharpness", "posterise", "solarise", "solarise_add"],
)
def test_increasing_means_a_larger_change(name):
    change = [np.abs(run(name, level).astype(int) - np.asarray(IMAGE)).mean() for level in (3, 9)]
    assert change[0] < change[1]


def test_posterise_keeps_fewer_bits():
    assert [run("posterise", level, image=grey(255))[0, 0, 0] for level in (0, 3, 5, 9, 10)] == [
        0xF0,
        0xE0,
        0xC0,
        0x80,
        0,
    ]
    assert run("posterise", 9, augment=DECREASING, image=grey(255))[0, 0, 0] == 0xE0


def test_solarise_starts_lower():
    # Level 9: threshold 256 - 230 = 26; values from it on are inverted.
    assert run("solarise", 9, image=grey(26))[0, 0, 0] == 229
    assert run("solarise", 9, image=grey(25))[0, 0, 0] == 25
    assert run("solarise", 9, augment=DECREASING, image=grey(229))[0, 0, 0] == 229
    assert run("solarise", 9, augment=DECREASING, image=grey(230))[0, 0, 0] == 25


def test_solarise_add_brightens_the_dark_half():
    assert run("solarise_add", 9, image=grey(20))[0, 0, 0] == 20 + 99
    assert run("solarise_add", 9, image=grey(128))[0, 0, 0] == 128


@pytest.mark.parametrize(("sign", "factor"), [(1.0, 1.81), (-1.0, 0.19)])
def test_brightness_moves_away_from_one(sign, factor):
    assert run("brightness", 9, sign, image=grey(100))[0, 0, 0] == int(100 * factor)


def test_enhancement_never_falls_below_a_tenth():
    assert run("brightness", 10, -1.0, image=grey(100))[0, 0, 0] == 10


def test_shift_is_relative_to_the_side_and_fills_with_the_mean():
    canvas = Canvas(fill=(1, 2, 3))
    augment = RandAugment(canvas=canvas)
    image = Image.new("RGB", (100, 50), (200, 200, 200))
    moved = run("shift_x", 10, 1.0, augment, image)
    assert (moved[:, 0] == 200).all() and (moved[:, 54] == 200).all()
    assert (moved[:, 56:] == (1, 2, 3)).all()
    moved = run("shift_y", 10, -1.0, augment, image)
    assert (moved[:22] == (1, 2, 3)).all() and (moved[24:] == 200).all()


def test_rotation_is_thirty_degrees_at_most():
    assert np.array_equal(
        run("rotate", 10),
        np.asarray(IMAGE.rotate(30, resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))),
    )


def test_notation():
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1")
    assert (augment.magnitude, augment.spread, augment.count, augment.probability) == (
        9.0,
        0.5,
        2,
        0.5,
    )
    assert run("brightness", 9, -1.0, augment, grey(100))[0, 0, 0] == 19
    plain = RandAugment.parse("rand-n3-p1")
    assert (plain.magnitude, plain.count, plain.probability) == (10.0, 3, 1.0)
    assert run("brightness", 0, 1.0, plain, grey(100))[0, 0, 0] == 10


@pytest.mark.parametrize("spec", ["m9", "rand-x3", "rand-m", "rand-m9-inc", "augmix-m3"])
def test_wrong_notation_is_refused(spec):
    with pytest.raises(RecipeError, match="rand-m<level>"):
        RandAugment.parse(spec)


def test_the_generator_is_the_only_randomness():
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1")
    first, again = (
        [np.asarray(augment(IMAGE, np.random.default_rng(seed))) for seed in range(40)]
        for _ in range(2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    unchanged = np.mean([np.array_equal(a, np.asarray(IMAGE)) for a in first])
    assert 0.05 < unchanged < 0.6  # both of two operations are left out a quarter of the time


def test_levels_spread_around_the_magnitude_and_stay_in_range():
    levels = []
    augment = RandAugment(9, spread=0.5)
    augment.operations["invert"] = lambda image, strength, sign, canvas: levels.append(
        (strength, sign)
    )
    rng = np.random.default_rng(0)
    for _ in range(2000):
        augment.apply("invert", IMAGE, rng)
    strengths, signs = np.array(levels).T
    assert abs(strengths.mean() - 0.9) < 0.01 and abs(strengths.std() - 0.05) < 0.005
    assert strengths.max() == 1.0 and abs(signs.mean()) < 0.1 and set(signs) == {-1.0, 1.0}
