# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against scikit-image, by hand, and what they refuse."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.metrics import psnr, ssim, to_uint8

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/pictures.npz"

# Float32 moments of pixels up to 255, against float64: scikit-image and ours agree this far.
TOLERANCE = 2e-6
DECIBELS = 1e-4  # a float32 sum of 768 equal squares one by one, times 10 / ln 10


def test_against_scikit_image():
    golden = np.load(GOLDENS, allow_pickle=False)
    picture, reference = golden["picture"], golden["reference"]
    np.testing.assert_allclose(jax.jit(psnr)(picture, reference), golden["psnr"], rtol=TOLERANCE)
    np.testing.assert_allclose(jax.jit(ssim)(picture, reference), golden["ssim"], atol=TOLERANCE)
    # The pictures are not symmetric in their sides, and every example is by itself.
    swapped = ssim(picture[::-1].swapaxes(1, 2), reference[::-1].swapaxes(1, 2))
    np.testing.assert_allclose(swapped, golden["ssim"][::-1], atol=TOLERANCE)


def test_small_window_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 1, 8, 8, 1)).astype(np.uint8)
    offsets = np.arange(-3, 4)
    weight = np.exp(-np.add.outer(offsets**2, offsets**2) / (2 * 1.5**2))
    weight /= weight.sum()
    values = []
    for y in range(2):
        for x in range(2):
            p, q = (np.float64(z[0, y : y + 7, x : x + 7, 0]) for z in (a, b))
            mean_p, mean_q = (weight * p).sum(), (weight * q).sum()
            var_p, var_q = (weight * (p - mean_p) ** 2).sum(), (weight * (q - mean_q) ** 2).sum()
            cov = (weight * (p - mean_p) * (q - mean_q)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mean_p * mean_q + c1) * (2 * cov + c2)
                / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
            )  # fmt: skip
    np.testing.assert_allclose(ssim(a, b, window=7), np.mean(values), atol=TOLERANCE)


def test_equal_and_opposite_pictures():
    picture = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    assert np.isposinf(psnr(picture, picture)).all()
    np.testing.assert_allclose(ssim(picture, picture), 1, atol=TOLERANCE)
    black, white = np.zeros_like(picture), np.full_like(picture, 255)
    np.testing.assert_allclose(psnr(black, white), 0, atol=DECIBELS)
    assert (np.asarray(ssim(black, white)) < 1e-3).all()


def test_pixels_are_rounded_and_clipped():
    values = jnp.array([-2, -1, -1 + 1 / 255, 0, 1 - 0.9 / 255, 1, 2], jnp.float32)
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255, 255]
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(np.float32(pixels) * np.float32(2 / 255) - 1), pixels)


def test_refusals():
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    for function in (psnr, ssim):
        with pytest.raises(ValueError, match="must be \\[b, y, x, c\\] alike"):
            function(picture, picture[:, :4])
        with pytest.raises(ValueError, match="expected uint8"):
            function(picture, picture.astype(np.float32))
    for window in (11, 4, 0):
        with pytest.raises(ValueError, match=f"window={window}: must be odd and at most .* 8x8"):
            ssim(picture, picture, window=window)
