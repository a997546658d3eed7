# SPDX-License-Identifier: Apache-2.0
"""Losses of speech by hand; padding, NaN included, never counts."""

import numpy as np
import pytest

from attnjax.losses import speech

VALID = np.array([[True, True, False], [True, False, False]])
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("squared", [False, True])
def test_mel(squared):
    x, y = RNG.standard_normal((2, 2, 3, 4)).astype(np.float32)
    difference = (x - y)[VALID]
    expected = np.mean(difference**2 if squared else np.abs(difference))
    x[~VALID] = np.nan
    found = speech.mean_error(speech.mel_error(x, y, VALID, squared=squared))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_durations_are_compared_as_logarithms():
    log_duration = RNG.standard_normal((2, 3)).astype(np.float32)
    duration = np.array([[0, 7, 0], [3, 0, 0]], np.int32)
    expected = np.mean((log_duration - np.log(duration + 1.0))[VALID] ** 2)
    found = speech.mean_error(speech.duration_error(log_duration, duration, VALID))
    assert float(found) == pytest.approx(expected, rel=1e-6)
    nothing = speech.duration_error(log_duration, duration, np.zeros((2, 3), bool))
    assert float(speech.mean_error(nothing)) == 0


def test_the_last_step_weighs_more():
    logits = np.array([[0.5, -1.0, np.nan], [2.0, 1.0, -3.0]], np.float32)
    values, valid = speech.end_error(logits, np.array([2, 3]), weight=5.0)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    terms = [-np.log(1 - sigmoid(0.5)), -5 * np.log(sigmoid(-1.0))]
    terms += [-np.log(1 - sigmoid(x)) for x in (2.0, 1.0)] + [-5 * np.log(sigmoid(-3.0))]
    np.testing.assert_allclose(values[valid], terms, rtol=1e-5)
    np.testing.assert_array_equal(valid.sum(axis=1), [2, 3])
    assert float(speech.mean_error((values, valid))) == pytest.approx(np.mean(terms), rel=1e-6)
