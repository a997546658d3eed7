# SPDX-License-Identifier: Apache-2.0
"""Measures of samples on sets whose answer is known, and on the digits."""

import jax
import numpy as np
import pytest

from attnjax.data.sources import Digits
from attnjax.metrics import Metric, SampleQuality, samples


def digits():
    data = Digits("train")
    images = np.stack([data[i]["image"] for i in range(len(data))]).astype(np.float32)
    return images / 127.5 - 1, np.array([data[i]["label"] for i in range(len(data))])


def measure(name, real, made, label, **options):
    return SampleQuality.of(name, real, made, label, **options).compute()


def test_real_digits_are_recognised_and_noise_is_not():
    image, label = digits()
    assert measure("recognised_real", image, image, label) > 0.98
    noise = np.random.default_rng(0).uniform(-1, 1, image.shape).astype(np.float32)
    assert measure("recognised", image, noise, label) < 0.25
    floor = measure("frechet_real", image, image, label)
    assert 0.1 < floor < 0.4
    assert measure("frechet", image, image, label) < floor
    assert measure("frechet", image, noise, label) > 20 * floor
    # One class for all: each sample looks real, but not like its class, and all look alike.
    ones = image[np.resize(np.flatnonzero(label == 1), len(label))]
    assert measure("recognised", image, ones, label) < 0.15
    assert measure("frechet", image, ones, label) > 20 * floor


def test_half_of_each_class_is_the_reference():
    label = np.array([2, 0, 2, 2, 0, 0, 2])
    np.testing.assert_array_equal(samples.every_other(label), [1, 1, 0, 1, 0, 1, 0])


def test_distance_by_hand():
    """Of uncorrelated features it is that of means and of deviations, one by one."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 3))
    rows = (rows - rows.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T, bias=True))).T
    a, b = rows * [1, 2, 0.5], rows * [3, 2, 0] + [0, 1, -2]
    expected = (0 + 1 + 4) + (4 + 0 + 0.25)
    assert samples.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert samples.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    assert samples.frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-9)
    assert samples.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_batches_merge_and_padding_does_not_count():
    image, label = (x[:200] for x in digits())
    made = image + 0.3 * np.random.default_rng(0).standard_normal(image.shape).astype(np.float32)
    for name in samples.MEASURES:
        whole = measure(name, image, made, label)
        parts = [
            jax.jit(SampleQuality.of, static_argnums=0)(name, image[rows], made[rows], label[rows])
            for rows in (slice(0, 70), slice(70, 200))
        ]
        assert isinstance(parts[0], Metric)
        assert parts[0].merge(parts[1]).compute() == pytest.approx(whole, rel=1e-5)
        pad = lambda x: np.concatenate([x, np.full_like(x[:5], 7)])
        valid = np.arange(205) < 200
        padded = measure(name, pad(image), pad(made), pad(label), valid=valid)
        assert padded == pytest.approx(whole, rel=1e-6)


def test_features_are_means_over_squares():
    image = np.arange(2 * 16 * 16 * 3, dtype=np.float32).reshape(2, 16, 16, 3)
    ours = samples.pooled_pixels(image).reshape(2, 8, 8, 3)
    np.testing.assert_allclose(ours[1, 3, 5], image[1, 6:8, 10:12].mean((0, 1)))
    assert samples.pooled_pixels(image[:, :6]).shape == (2, 6 * 8 * 3)


def test_what_cannot_be_measured():
    image, label = (x[:3] for x in digits())
    assert np.isnan(measure("recognised", image, image, label))
    image, label = (x[:200] for x in digits())
    assert np.isnan(measure("frechet", image, image * np.nan, label))
    with pytest.raises(ValueError, match="measure 'fid': choose from frechet"):
        SampleQuality.of("fid", image, image, label)
    with pytest.raises(ValueError, match="do not fit"):
        SampleQuality.of("frechet", image, image[:, :4], label)
    with pytest.raises(ValueError, match="must be"):
        samples.pooled_pixels(image[0])
