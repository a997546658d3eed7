# SPDX-License-Identifier: Apache-2.0
"""Bicubic resampling against the four-tap formula, written out pixel by pixel in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import bicubic_resize

ROUNDING = 2e-6  # float32 sums of sixteen products of numbers below 1.3


def cubic(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def four_taps(line: np.ndarray, new_size: int) -> np.ndarray:
    """Resample the first axis."""
    size = len(line)
    result = np.zeros((new_size, *line.shape[1:]))
    for i in range(new_size):
        x = (i + 0.5) * size / new_size - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            result[i] += cubic(x - j) * line[min(max(j, 0), size - 1)]
    return result


def oracle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.moveaxis(four_taps(np.moveaxis(image.astype(np.float64), 1, 0), height), 0, 1)
    return np.moveaxis(four_taps(np.moveaxis(rows, 2, 0), width), 0, 2)


@pytest.mark.parametrize(
    ("size", "new_size"),
    [((240, 240), (224, 224)), ((7, 9), (16, 5)), ((1, 4), (3, 4)), ((12, 10), (12, 30))],
)
def test_equals_four_tap_formula(size, new_size):
    channels = 1 if size[0] > 100 else 3
    image = np.random.default_rng(0).uniform(size=(1, *size, channels)).astype(np.float32)
    result = bicubic_resize(jnp.asarray(image), *new_size)
    assert result.shape == (1, *new_size, channels)
    np.testing.assert_allclose(result, oracle(image, *new_size), rtol=0, atol=ROUNDING)


def test_is_neither_antialiased_nor_catmull_rom():
    image = jnp.asarray(np.random.default_rng(1).uniform(size=(1, 24, 24, 1)), jnp.float32)
    ours = bicubic_resize(image, 20, 20)
    for antialias in (False, True):
        other = jax.image.resize(image, (1, 20, 20, 1), "cubic", antialias=antialias)
        assert np.abs(np.asarray(ours - other)).max() > 1e-2


def test_keeps_constants_sizes_and_dtypes():
    flat = jnp.full((2, 5, 6, 3), 0.7)
    np.testing.assert_allclose(bicubic_resize(flat, 8, 9), 0.7, atol=ROUNDING)
    image = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, 6, 2)), jnp.bfloat16)
    same = bicubic_resize(image, 6, 6)
    assert same.dtype == jnp.bfloat16
    np.testing.assert_array_equal(same, image)
    assert bicubic_resize(image, 3, 4).dtype == jnp.bfloat16


def test_works_under_jit_grad_and_vmap():
    image = jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, 6, 5, 2)), jnp.float32)
    gradient = jax.grad(lambda x: bicubic_resize(x, 4, 7).sum())(image[0])
    weights = oracle(np.eye(30).reshape(30, 6, 5, 1), 4, 7).sum(axis=(1, 2, 3)).reshape(6, 5)
    np.testing.assert_allclose(gradient[0, :, :, 0], weights, atol=10 * ROUNDING)
    batched = jax.jit(jax.vmap(lambda x: bicubic_resize(x, 4, 7)))(image)
    np.testing.assert_allclose(batched[1], bicubic_resize(image[1], 4, 7), atol=ROUNDING)


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), (2, 2), r"\[b,y,x,c\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), (2, 2), "uint8"),
        (np.zeros((1, 4, 4, 3), np.float32), (0, 2), "positive"),
    ],
)
def test_refuses_what_it_cannot_resize(image, size, message):
    with pytest.raises(ValueError, match=message):
        bicubic_resize(jnp.asarray(image), *size)
