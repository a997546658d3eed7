# SPDX-License-Identifier: Apache-2.0
"""Distortions: warping by hand and against librosa, what counts, what padding changes."""

import functools

import jax
import numpy as np
import pytest

from attnjax import audio
from attnjax.metrics import speech
from tests.goldens.make_speech import GOLDENS, RATE, wave

SHORTER = 3_300


def by_hand(x, y):
    """The table of costs, cell by cell."""
    cost = np.full((len(x) + 1, len(y) + 1), np.inf)
    cost[0, 0] = 0
    for i in range(len(x)):
        for j in range(len(y)):
            best = min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
            cost[i + 1, j + 1] = best + np.sqrt(np.mean((x[i] - y[j]) ** 2))
    return cost[-1, -1]


def test_warping_equals_the_table_filled_by_hand():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, 7, 3)), rng.standard_normal((4, 5, 3))
    x_lengths, y_lengths = np.array([7, 1, 4, 7]), np.array([5, 5, 1, 2])
    found = jax.jit(speech.warped_cost)(x, y, x_lengths, y_lengths)
    lengths = zip(x, y, x_lengths, y_lengths, strict=True)
    expected = [by_hand(a[:m], b[:n]) for a, b, m, n in lengths]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(speech.warped_cost(x[:, :2], x[:, :2]), 0)


def test_repeated_frames_cost_nothing():
    x = np.random.default_rng(0).standard_normal((1, 6, 4))
    slow = np.repeat(x, 3, axis=1)
    np.testing.assert_allclose(speech.warped_cost(x, slow), 0)


@functools.cache
def measured():
    """Both distortions of a batch: two pairs, the second padded with what must not matter."""
    first, second = np.stack([wave("first")] * 2), np.stack([wave("second")] * 2)
    second[1, SHORTER:] = 3.0
    lengths = {
        "reference_lengths": np.array([4_400, 4_400]),
        "synthesised_lengths": np.array([4_400, SHORTER]),
    }

    @jax.jit
    def run(valid):
        options = {**lengths, "valid": valid}
        return (
            speech.mel_cepstral_distortion(first, second, RATE, **options),
            speech.mel_spectral_distortion(first, second, RATE, **options),
        )

    return run


def test_distortions_are_those_of_librosa_per_synthesised_frame():
    states = measured()(np.array([False, True]))
    frames = audio.frame_count(SHORTER, 275)
    with np.load(GOLDENS, allow_pickle=False) as golden:
        for name, state in zip(("cepstral_cost", "spectral_cost"), states, strict=True):
            assert int(state.weight) == frames
            assert state.compute() == pytest.approx(golden[name] / frames, rel=1e-4)


def test_utterances_weigh_by_their_frames():
    run = measured()
    (both, _), (one, _), (other, _) = (
        run(np.array(valid)) for valid in ([True, True], [True, False], [False, True])
    )
    assert both.compute() == pytest.approx(one.merge(other).compute(), rel=1e-6)
    assert int(both.weight) == 17 + 13


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"are not \[b,t,c\] and \[b,s,c\]"):
        speech.warped_cost(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)))
