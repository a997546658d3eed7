# SPDX-License-Identifier: Apache-2.0
"""Correlation over shared methods, benefit of attention, other lengths."""

import math

import pytest

from attnjax.benchmarks.cab.correlation import benefits, correlations, extrapolation, pearson


def test_only_shared_methods_count():
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "x": 9.0, "y": math.nan}
    second = {"a": 5.0, "b": 3.0, "c": 1.0, "y": 2.0, "z": 0.0}
    coefficient, number = pearson(first, second)
    assert coefficient == pytest.approx(-1) and number == 3
    assert math.isnan(pearson({"a": 1.0}, {"a": 2.0})[0])
    assert math.isnan(pearson({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 3.0})[0])
    table = correlations({"self": first, "cross": second})
    assert table["self", "self"][0] == pytest.approx(1)
    assert table["self", "cross"] == table["cross", "self"] == (coefficient, number)


def test_benefit_and_extrapolation():
    assert benefits({"lm": 0.5, "tts": 0.1, "sr": 1.0}, {"lm": -0.5, "tts": 0.2}) == {
        "lm": 1.0,
        "tts": -0.1,
    }
    assert extrapolation({16: 30.0, 8: 20.0, 32: 10.0}, 8) == {8: 1.0, 16: 1.5, 32: 0.5}
    with pytest.raises(ValueError, match="no score at the length of training 64"):
        extrapolation({8: 1.0}, 64)
