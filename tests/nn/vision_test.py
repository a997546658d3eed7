# SPDX-License-Identifier: Apache-2.0
"""Frequency bands and position tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.vision import band_filter, interpolate_positions

# Float32 rounding of sums over a Gaussian window.
TOLERANCE = 1e-5


def wave(period, side=48):
    x = jnp.cos(2 * jnp.pi * (jnp.arange(side) + 0.5) / period)
    return jnp.broadcast_to(x[None, None, :, None], (1, side, side, 1))


def test_bands_separate_a_checker_from_a_broad_wave():
    fine, coarse = wave(2.0) + wave(4.0), wave(48.0)
    assert jnp.abs(band_filter(fine, "lowpass")).max() < 0.02
    assert jnp.abs(band_filter(coarse, "highpass")).max() < 0.005
    np.testing.assert_allclose(band_filter(fine, "highpass"), fine, atol=0.05)
    np.testing.assert_allclose(band_filter(coarse, "lowpass"), coarse, atol=0.05)


def test_a_constant_is_lowpass_only():
    image = jnp.full((1, 8, 8, 2), 3.0)
    np.testing.assert_allclose(band_filter(image, "lowpass"), image, atol=TOLERANCE)
    np.testing.assert_allclose(band_filter(image, "highpass"), 0, atol=TOLERANCE)
    np.testing.assert_array_equal(band_filter(image, "all"), image)


def test_unknown_band():
    with pytest.raises(ValueError, match="band 'mid' is unknown"):
        band_filter(jnp.zeros((1, 8, 8, 1)), "mid")


def test_position_tables_keep_class_token_and_linear_ramps():
    side, new = 14, 24
    ramp = jnp.broadcast_to((jnp.arange(side) + 0.5)[:, None, None] / side, (side, side, 4))
    cls = jax.random.normal(jax.random.key(0), (1, 1, 4))
    table = jnp.concatenate([cls, ramp.reshape(1, -1, 4)], axis=1)
    resized = interpolate_positions(table, (new, new))
    assert resized.shape == (1, 1 + new * new, 4)
    np.testing.assert_array_equal(resized[:, :1], cls)
    rows = resized[0, 1:].reshape(new, new, 4)[:, 0, 0]
    expected = (np.arange(new) + 0.5) / new
    # Cubic interpolation with a = -0.75 bends a ramp slightly; the border is clamped.
    np.testing.assert_allclose(rows[3:-3], expected[3:-3], atol=0.3 / side)


def test_position_tables_of_the_same_size_are_untouched():
    table = jnp.ones((1, 10, 4))
    assert interpolate_positions(table, (3, 3)) is table
    with pytest.raises(ValueError, match="10 positions do not form a square"):
        interpolate_positions(jnp.ones((1, 11, 4)), (3, 3))
