# SPDX-License-Identifier: Apache-2.0
"""Write speech.npz: spectra, cepstra, waves and warped distances of librosa.

Run:  python tests/goldens/make_speech.py

Needs librosa. The waves are functions of their names, so that they need not be stored.
"""

import pathlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("speech.npz")
RATE = 22_050


def wave(name: str, samples: int = 4_400) -> np.ndarray:
    """Return a sweep with a little noise, float32 `[samples]`."""
    seed, pitch = {"first": (0, 180.0), "second": (1, 230.0)}[name]
    time = np.arange(samples) / RATE
    phase = 2 * np.pi * (pitch * time + 300 * time**2)
    tones = sum(np.sin(k * phase) / k for k in range(1, 9))
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.3 * tones * np.hanning(samples) + 0.01 * noise).astype(np.float32)


def main() -> None:
    """Compute and store all values."""
    import librosa
    import scipy.fft

    stft = dict(n_fft=1024, hop_length=256, win_length=1024, window="hann", pad_mode="reflect")
    first, second = wave("first"), wave("second")
    magnitude = np.abs(librosa.stft(first, **stft))
    filters = librosa.filters.mel(sr=RATE, n_fft=1024, n_mels=80, fmin=20, fmax=8000)
    window, hop = int(0.05 * RATE), int(0.0125 * RATE)

    def spectral(y):
        energy = librosa.feature.melspectrogram(
            y=y, sr=RATE, n_fft=window, hop_length=hop, win_length=window, window="hann",
            pad_mode="reflect", power=2.0, n_mels=80, fmin=20, htk=True, norm=None,
        )  # fmt: skip
        return np.log(energy + 1e-6).T

    def cepstral(y):
        return scipy.fft.dct(spectral(y), axis=-1, norm="ortho")[:, :13]

    def warped(x, y):
        distance = np.sqrt(np.mean((x[:, None] - y[None]) ** 2, axis=-1))
        return librosa.sequence.dtw(C=distance)[0][-1, -1]

    shorter = second[:3_300]
    inverted = librosa.griffinlim(
        magnitude, n_iter=4, momentum=0, init=None, **stft, length=256 * (magnitude.shape[1] - 1)
    )
    np.savez_compressed(
        GOLDENS,
        log_mel=np.log(np.maximum(filters @ magnitude, 1e-5)).T.astype(np.float32),
        spectral=spectral(first).astype(np.float32),
        cepstral=cepstral(first).astype(np.float32),
        griffin_lim=inverted.astype(np.float32),
        cepstral_cost=warped(cepstral(first), cepstral(shorter)),
        spectral_cost=warped(spectral(first), spectral(shorter)),
    )


if __name__ == "__main__":
    main()
