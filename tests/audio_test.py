# SPDX-License-Identifier: Apache-2.0
"""Spectra and waves: equal to librosa's, the same in NumPy and JAX, untouched by padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import audio
from tests.goldens.make_speech import GOLDENS, RATE, wave

FLOAT = 2e-4  # logarithms of float32 sums near the floor
MEL = audio.Mel()
LENGTH, HOP = 4_400, 256


@functools.cache
def golden(name):
    with np.load(GOLDENS, allow_pickle=False) as file:
        return file[name]


def test_log_mel_is_that_of_librosa():
    found = audio.log_mel(wave("first"), MEL)
    assert found.dtype == np.float32 and found.shape == (1 + LENGTH // HOP, 80)
    np.testing.assert_allclose(found, golden("log_mel"), atol=FLOAT)


def test_features_of_distortions_are_those_of_librosa():
    mel = audio.distortion_features(RATE)
    assert (mel.window, mel.hop) == (1102, 275)
    found = audio.log_mel(wave("first"), mel)
    np.testing.assert_allclose(found, golden("spectral"), atol=FLOAT)
    np.testing.assert_allclose(audio.cepstrum(found), golden("cepstral"), atol=5 * FLOAT)


def test_griffin_lim_is_that_of_librosa():
    magnitude = np.abs(audio.stft(wave("first"), 1024, HOP))
    found = audio.griffin_lim(magnitude, 0.0, window=1024, hop=HOP, iterations=4)
    assert found.shape == (LENGTH // HOP * HOP,)
    np.testing.assert_allclose(found, golden("griffin_lim"), atol=1e-4)


def test_the_inverse_gives_the_wave_back():
    x = wave("second")
    found = audio.istft(audio.stft(x, 1024, HOP), 1024, HOP)
    np.testing.assert_allclose(found, x[: len(found)], atol=1e-5)


def test_griffin_lim_approaches_the_magnitudes():
    magnitude = np.abs(audio.stft(wave("first"), 1024, HOP))
    phase = np.random.default_rng(0).uniform(-np.pi, np.pi, magnitude.shape).astype(np.float32)

    def distance(iterations):
        found = audio.griffin_lim(magnitude, phase, window=1024, hop=HOP, iterations=iterations)
        found = np.abs(audio.stft(found, 1024, HOP))
        return np.linalg.norm(found - magnitude) / np.linalg.norm(magnitude)

    assert distance(32) < 0.3 * distance(0)


def test_magnitudes_have_the_spectrogram_that_they_are_made_from():
    spectrogram = audio.log_mel(wave("first"), MEL)
    again = np.log(np.maximum(audio.magnitudes(spectrogram, MEL) @ MEL.filters, MEL.floor))
    # What the pseudo-inverse makes negative is lost.
    assert np.abs(again - spectrogram).mean() < 0.3


def test_jax_agrees_and_samples_beyond_the_length_do_not_exist():
    """Everything that the metrics need, compiled once: two lengths in one batch."""
    lengths = np.array([LENGTH, 9 * HOP])
    waves = np.stack([wave("first"), wave("second")])
    waves[1, 9 * HOP :] = 7.0
    frames = audio.frame_count(lengths, HOP)

    @jax.jit
    def run(waves, lengths):
        spectrogram = audio.log_mel(waves, MEL, lengths)
        magnitude = audio.magnitudes(spectrogram, MEL)
        frames = audio.frame_count(lengths, HOP)
        back = audio.griffin_lim(
            magnitude, jnp.zeros(()), window=1024, hop=HOP, iterations=2, frames=frames,
            loop=jax.lax.fori_loop,
        )  # fmt: skip
        return spectrogram, back

    spectrogram, back = run(waves, lengths)
    for row, (length, count) in enumerate(zip(lengths, frames, strict=True)):
        alone = audio.log_mel(waves[row, :length], MEL)
        np.testing.assert_allclose(spectrogram[row, :count], alone, atol=FLOAT)
        magnitude = audio.magnitudes(alone, MEL)
        expected = audio.griffin_lim(magnitude, 0.0, window=1024, hop=HOP, iterations=2)
        np.testing.assert_allclose(back[row, : len(expected)], expected, atol=1e-3)
        assert not np.asarray(back[row, len(expected) :]).any()


def test_pitch_and_energy_of_a_tone_are_known():
    time = np.arange(RATE // 2) / RATE
    tone = np.where(time < 0.25, 0.5, 0.0) * np.sin(2 * np.pi * 220.5 * time)
    tone += 0.25 * np.where(time < 0.25, 1, 0) * np.sin(2 * np.pi * 441 * time)
    found = audio.pitch(tone, MEL)
    frames = len(found)
    np.testing.assert_allclose(found[4 : frames // 2 - 4], 220.5, rtol=2e-3)
    assert not found[frames // 2 + 4 :].any()
    loud, louder = audio.energy(tone, MEL), audio.energy(2 * tone, MEL)
    assert loud.shape == (frames,) and not loud[frames // 2 + 4 :].any()
    np.testing.assert_allclose(louder, 2 * loud, rtol=1e-6)
    # Parseval: half of the bins hold half of window * (sum of squares), but for both ends.
    piece = tone[8 * 256 - 512 : 8 * 256 + 512]
    ends = piece.sum() ** 2 + (piece * (-1) ** np.arange(1024)).sum() ** 2
    expected = np.sqrt((1024 * (piece**2).sum() + ends) / 2)
    np.testing.assert_allclose(loud[8], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "bark"}, "scale='bark': must be one of slaney, htk"),
        ({"hop": 2_000}, "hop=2000: must be at most window=1024"),
        ({"high": 12_000.0}, "half of rate=22050"),
        ({"bands": 0}, "bands=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        audio.Mel(**change)
    with pytest.raises(ValueError, match="count=81"):
        audio.cepstrum(np.zeros((2, 80)), 81)
