# SPDX-License-Identifier: Apache-2.0
"""Indicators of maps made by hand have their closed forms; padding does not count."""

import doctest
import math

import numpy as np
import pytest

from attnjax.metrics import attention_maps
from attnjax.metrics.attention_maps import indicators, local_focus, min_max

T = 6
ROWS = np.arange(1, T + 1)
UNIFORM = np.tril(np.ones((T, T))) / ROWS[:, None]
IDENTITY = np.eye(T)
FIRST = np.eye(T)[np.zeros(T, int)]

EXPECTED = {
    "uniform": (
        UNIFORM,
        {
            "entropy": np.log(ROWS).mean(),
            "concentration": math.sqrt((1 / ROWS).sum()),
            "sink": (1 / ROWS).mean(),
            "local_focus_0": (1 / ROWS).mean(),
            "local_focus_3": (1 / ROWS[3:]).mean(),
        },
    ),
    "identity": (
        IDENTITY,
        {
            "entropy": 0.0, "concentration": math.sqrt(T), "sink": 1 / T, "local_focus_0": 1.0,
            "local_focus_1": 0.0,
        },
    ),
    "first": (
        FIRST,
        {
            "entropy": 0.0, "concentration": math.sqrt(T), "sink": 1.0, "local_focus_0": 1 / T,
            "local_focus_2": 1 / (T - 2),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_closed_forms(name):
    one, expected = EXPECTED[name]
    maps = np.broadcast_to(one, (2, 3, 4, T, T))
    measured = indicators(maps)
    assert all(x.shape == (2,) and x.dtype == np.float32 for x in measured.values())
    for key, value in (expected | {"head_diversity": 0.0}).items():
        np.testing.assert_allclose(measured[key], value, rtol=1e-6, atol=1e-7, err_msg=key)


def test_heads_that_differ():
    """Two heads, one uniform and one diagonal: the deviation of two numbers is half of the gap."""
    maps = np.stack([UNIFORM, IDENTITY])[None, None]
    gap = np.abs(UNIFORM - IDENTITY) / 2
    expected = 2 / (T * (T + 1)) * np.tril(gap).sum()
    np.testing.assert_allclose(indicators(maps)["head_diversity"], [expected], rtol=1e-6)


def test_layers_keep_apart_and_texts_are_averaged():
    layers = np.stack([np.stack([IDENTITY, FIRST]), np.stack([FIRST, FIRST])])[:, :, None]
    np.testing.assert_allclose(indicators(layers)["sink"], [(1 / T + 1) / 2, 1], rtol=1e-6)


def test_padding_does_not_count():
    rng = np.random.default_rng(0)
    short = 4
    maps = np.tril(rng.random((2, 1, 3, short, short)))
    maps = maps / maps.sum(-1, keepdims=True)
    padded = rng.random((2, 1, 3, T, T))
    padded[..., :short, :] = 0
    padded[..., :short, :short] = maps
    alone, measured = indicators(maps), indicators(padded, np.array([short]))
    for name, value in alone.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)


def test_figures_scale_to_one():
    np.testing.assert_allclose(min_max(np.array([1.0, 3.0, 2.0])), [0, 1, 0.5])
    np.testing.assert_array_equal(min_max(np.ones(3)), np.zeros(3))


def test_refusals():
    with pytest.raises(ValueError, match="t = s"):
        indicators(np.ones((1, 1, 1, 2, 3)))
    with pytest.raises(ValueError, match="distance=6"):
        local_focus(np.ones((1, 1, 1, T, T)), T)


def test_example_of_the_docstring():
    assert doctest.testmod(attention_maps).failed == 0
