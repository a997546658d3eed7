# SPDX-License-Identifier: Apache-2.0
"""Speech as spectra: log-mel features, cepstra, pitch, energy, and waves back from features.

Every function but `pitch` computes with the library of the array that it is given, so that NumPy on
the host (data) and JAX under `jit` (metrics) share one definition; this module imports no JAX.
Lengths may differ inside a batch: where a length is given, samples or frames beyond it influence
nothing.

Features are those of fairseq's speech synthesis, which CAB (arXiv 2210.07661) trains with; the
distortions of arXiv 2011.03568 have features of their own (`DISTORTION`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

SCALES = ("slaney", "htk")
"""How mel relates to hertz, and how filters are scaled: as in librosa, or as in torchaudio."""

_TINY = 1e-8

Repeat = Callable[[int, int, Callable[[int, Any], Any], Any], Any]


@dataclasses.dataclass(frozen=True)
class Mel:
    """A log-mel spectrogram: log(max(filters(|stft|^power), floor) + offset).

    Attributes:
      rate: samples per second.
      window: samples of the Hann window, and of the Fourier transform.
      hop: samples from one frame to the next.
      bands: mel filters.
      low, high: hertz of the lowest and the highest filter's end; high=0: half the rate.
      power: exponent of the magnitudes.
      scale: one of `SCALES`.
      floor, offset: see above.

    Raises:
      ValueError: a value is out of range.
    """

    rate: int = 22_050
    window: int = 1_024
    hop: int = 256
    bands: int = 80
    low: float = 20.0
    high: float = 8_000.0
    power: float = 1.0
    scale: str = "slaney"
    floor: float = 1e-5
    offset: float = 0.0

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale!r}: must be one of {', '.join(SCALES)}")
        for name in ("rate", "window", "hop", "bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.hop > self.window:
            raise ValueError(f"hop={self.hop}: must be at most window={self.window}")
        if not 0 <= self.low < self.top <= self.rate / 2:
            raise ValueError(
                f"low={self.low}, high={self.high}: must grow and stay below half of "
                f"rate={self.rate}"
            )

    @property
    def top(self) -> float:
        """Hertz of the highest filter's end."""
        return self.high or self.rate / 2

    @functools.cached_property
    def filters(self) -> np.ndarray:
        """Weights `[bins, bands]` float32 of the triangular filters."""
        to_mel, to_hertz = _CONVERSIONS[self.scale]
        edges = to_hertz(np.linspace(to_mel(self.low), to_mel(self.top), self.bands + 2))
        bins = np.linspace(0, self.rate / 2, self.window // 2 + 1)[:, None]
        rising = (bins - edges[:-2]) / np.diff(edges[:-1])
        falling = (edges[2:] - bins) / np.diff(edges[1:])
        weights = np.maximum(0, np.minimum(rising, falling))
        if self.scale == "slaney":  # All filters have the same area.
            weights *= 2 / (edges[2:] - edges[:-2])
        return weights.astype(np.float32)

    @functools.cached_property
    def inverse(self) -> np.ndarray:
        """The pseudo-inverse `[bands, bins]` float32 of the filters."""
        return np.linalg.pinv(self.filters.astype(np.float64)).astype(np.float32)


def distortion_features(rate: int) -> Mel:
    """Return the features of arXiv 2011.03568: 80 bands of 50 ms windows, every 12.5 ms."""
    return Mel(
        rate, window=int(0.05 * rate), hop=int(0.0125 * rate), high=0.0, power=2.0, scale="htk",
        floor=0.0, offset=1e-6,
    )  # fmt: skip


def frame_count(samples: Any, hop: int) -> Any:
    """Return how many frames `stft` makes of so many samples (a number or an array)."""
    return 1 + samples // hop


def stft(wave: Any, window: int, hop: int, lengths: Any = None, *, is_tapered: bool = True) -> Any:
    """Return the Fourier transform of windows around every hop-th sample.

    Waves are mirrored at both ends.

    Args:
      wave: `[..., samples]` float; more than half a window.
      window, hop: samples.
      lengths: int `[...]`, samples that exist; all if None.
      is_tapered: with a periodic Hann window, or else with a rectangular one.

    Returns:
      complex `[..., frames, bins]`; frames beyond the length are 0.
    """
    xp, samples = _library(wave), wave.shape[-1]
    frames = frame_count(samples, hop)
    place = np.arange(frames)[:, None] * hop + np.arange(window) - window // 2
    if lengths is None:
        place = np.abs(place)
        place = np.where(place >= samples, 2 * (samples - 1) - place, place).clip(0, samples - 1)
        pieces = wave[..., place]
    else:
        last = lengths[..., None] - 1
        place = xp.abs(xp.asarray(place.reshape(-1)))
        place = xp.where(place > last, 2 * last - place, place)
        pieces = xp.take_along_axis(wave, xp.clip(place, 0, samples - 1), axis=-1)
        pieces = pieces.reshape(*wave.shape[:-1], frames, window)
    if is_tapered:
        pieces = pieces * _hann(window).astype(wave.dtype)
    spectrum = xp.fft.rfft(pieces, axis=-1)
    if lengths is None:
        return spectrum
    return xp.where(_exist(xp, frames, frame_count(lengths, hop)), spectrum, 0)


def istft(spectrum: Any, window: int, hop: int, frames: Any = None) -> Any:
    """Return the wave whose `stft` is nearest to a spectrum.

    Args:
      spectrum: complex `[..., frames, bins]`.
      window, hop: samples.
      frames: int `[...]`, frames that exist; all if None.

    Returns:
      `[..., hop * (frames - 1)]` float; 0 beyond the frames that exist.
    """
    xp, count = _library(spectrum), spectrum.shape[-2]
    hann = _hann(window).astype(np.float32)
    pieces = xp.fft.irfft(spectrum, n=window, axis=-1) * hann
    weights = xp.asarray(np.broadcast_to(hann**2, (count, window)))
    if frames is not None:
        exist = _exist(xp, count, frames)
        pieces, weights = xp.where(exist, pieces, 0), xp.where(exist, weights, 0)
    start, size = window // 2, hop * (count - 1)
    wave = _overlap_add(xp, pieces, hop)[..., start : start + size]
    total = _overlap_add(xp, weights, hop)[..., start : start + size]
    exist = total > _TINY
    if frames is not None:
        exist &= xp.arange(size) < hop * (frames[..., None] - 1)
    return xp.where(exist, wave / xp.maximum(total, _TINY), 0)


def log_mel(wave: Any, mel: Mel, lengths: Any = None) -> Any:
    """Return the log-mel spectrogram `[..., frames, bands]` of a wave; arguments as in `stft`."""
    xp = _library(wave)
    magnitude = xp.abs(stft(wave, mel.window, mel.hop, lengths))
    energy = magnitude if mel.power == 1 else magnitude**mel.power
    # Not "@": the threads of NumPy's matrix product wait for each other in many data workers.
    energy = xp.einsum("...f,fm->...m", energy, mel.filters)
    return xp.log(xp.maximum(energy, mel.floor) + mel.offset)


def cepstrum(spectrogram: Any, count: int = 13) -> Any:
    """Return the first orthonormal cosine coefficients of a log-mel spectrogram (MFCC).

    c_k = sqrt((2 - [k = 0]) / m) sum_j x_j cos(pi k (j + 1/2) / m)

    Args:
      spectrogram: `[..., m]`.
      count: how many, at most m.

    Returns:
      `[..., count]`.
    """
    bands = spectrogram.shape[-1]
    if not 1 <= count <= bands:
        raise ValueError(f"count={count}: must be between 1 and the {bands} bands")
    angles = np.pi / bands * np.outer(np.arange(bands) + 0.5, np.arange(count))
    basis = np.cos(angles) * np.sqrt(np.where(np.arange(count), 2, 1) / bands)
    return spectrogram @ basis.astype(np.float32)


def magnitudes(spectrogram: Any, mel: Mel) -> Any:
    """Return magnitudes `[..., frames, bins]` whose log-mel spectrogram is about the given one.

    The filters' pseudo-inverse is applied, and what is negative set to 0.
    """
    xp = _library(spectrogram)
    energy = xp.maximum(xp.exp(spectrogram) - mel.offset, 0) @ mel.inverse
    return xp.maximum(energy, 0) ** (1 / mel.power)


def repeat(lower: int, upper: int, body: Callable[[int, Any], Any], value: Any) -> Any:
    """Apply `body(i, value)` for every i; `jax.lax.fori_loop` compiles the body only once."""
    for i in range(lower, upper):
        value = body(i, value)
    return value


def griffin_lim(
    magnitude: Any,
    phase: Any,
    *,
    window: int,
    hop: int,
    iterations: int = 32,
    frames: Any = None,
    loop: Repeat = repeat,
) -> Any:
    """Return a wave of given magnitudes (Griffin and Lim, 1984).

    wave <- istft(magnitude exp(i angle(stft(wave)))), repeated

    Args:
      magnitude: `[..., frames, bins]`.
      phase: radians to start with, broadcastable to the magnitudes.
      window, hop: samples; the hop at most a quarter of the window works well.
      iterations: how often phases are replaced.
      frames: int `[...]`, frames that exist; all if None.
      loop: `repeat`, or `jax.lax.fori_loop`.

    Returns:
      `[..., hop * (frames - 1)]` float.
    """
    xp = _library(magnitude)
    lengths = None if frames is None else hop * (frames - 1)

    def improve(_, wave):
        spectrum = stft(wave, window, hop, lengths)
        size = xp.maximum(xp.abs(spectrum), _TINY)
        return istft(magnitude * (spectrum / size), window, hop, frames)

    phase = xp.broadcast_to(phase, magnitude.shape)
    start = magnitude * (xp.cos(phase) + 1j * xp.sin(phase)).astype(np.complex64)
    return loop(0, iterations, improve, istft(start, window, hop, frames))


def energy(wave: Any, mel: Mel) -> Any:
    """Return the norm of the magnitudes of every frame, without a taper, `[..., frames]`."""
    xp = _library(wave)
    magnitude = xp.abs(stft(wave, mel.window, mel.hop, is_tapered=False))
    return xp.sqrt(xp.sum(magnitude**2, axis=-1))


def pitch(
    wave: np.ndarray, mel: Mel, *, lowest: float = 71.0, highest: float = 800.0,
    threshold: float = 0.15,
) -> np.ndarray:  # fmt: skip
    """Return the fundamental frequency of every frame in hertz, 0 where there is none.

    YIN (de Cheveigne and Kawahara, 2002, Eqs. 6 to 8) with parabolic interpolation; the reference
    code takes WORLD's DIO instead.

    Args:
      wave: `[samples]`, NumPy.
      mel: rate and hop.
      lowest, highest: hertz.
      threshold: of the normalised difference below which a frame is voiced.

    Returns:
      `[frames]` float64.
    """
    longest, shortest = int(mel.rate / lowest) + 1, max(2, int(mel.rate / highest))
    size = 2 * longest
    padded = np.pad(np.asarray(wave, np.float64), (longest, longest + size))
    starts = np.arange(frame_count(len(wave), mel.hop)) * mel.hop
    pieces = padded[starts[:, None] + np.arange(size)]
    # sum_j (x_j - x_(j+lag))^2 over the first half, by correlation.
    first = np.fft.rfft(pieces[:, :longest], 2 * size)
    product = np.fft.irfft(np.conj(first) * np.fft.rfft(pieces, 2 * size), 2 * size)
    squares = np.cumsum(np.pad(pieces**2, ((0, 0), (1, 0))), axis=1)
    own = squares[:, longest : size + 1] - squares[:, : longest + 1]
    difference = np.maximum(own[:, :1] + own - 2 * product[:, : longest + 1], 0)
    lags = np.arange(1, longest + 1)
    mean = np.cumsum(difference[:, 1:], axis=1) / lags
    normal = np.ones_like(difference)
    normal[:, 1:] = np.where(mean > _TINY, difference[:, 1:] / np.maximum(mean, _TINY), 1)
    inner = normal[:, 1:-1]
    is_dip = (inner < normal[:, :-2]) & (inner <= normal[:, 2:]) & (inner < threshold)
    is_dip &= np.arange(1, longest) >= shortest
    lag = 1 + np.argmax(is_dip, axis=1)
    rows = np.arange(len(lag))
    before, here, after = (normal[rows, lag + step] for step in (-1, 0, 1))
    bend = before - 2 * here + after
    shift = np.where(bend > 0, (before - after) / np.where(bend > 0, 2 * bend, 1), 0)
    return np.where(is_dip.any(axis=1), mel.rate / (lag + shift), 0)


def _library(array):
    return array.__array_namespace__()


@functools.lru_cache
def _hann(window):
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


def _exist(xp, size, counts):
    """Return bool `[..., size, 1]`: which frames are among the first `counts [...]`."""
    return (xp.arange(size) < counts[..., None])[..., None]


def _overlap_add(xp, pieces, hop):
    """Return the sum `[..., samples]` of pieces `[..., t, window]`, each a hop after the other."""
    *batch, count, window = pieces.shape
    parts = -(-window // hop)
    margin = [(0, 0)] * len(batch)
    pieces = xp.pad(pieces, [*margin, (0, 0), (0, parts * hop - window)])
    pieces = pieces.reshape(*batch, count, parts, hop)
    total = 0
    for part in range(parts):
        total = total + xp.pad(pieces[..., part, :], [*margin, (part, parts - 1 - part), (0, 0)])
    return total.reshape(*batch, -1)


def _slaney_mel(hertz):
    hertz = np.asarray(hertz, np.float64)
    step = np.log(6.4) / 27
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + np.log(np.maximum(hertz, 1) / 1000) / step)


def _slaney_hertz(mel):
    step = np.log(6.4) / 27
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(step * (np.asarray(mel) - 15)))


_CONVERSIONS = {
    "slaney": (_slaney_mel, _slaney_hertz),
    "htk": (
        lambda hertz: 2595 * np.log10(1 + np.asarray(hertz) / 700),
        lambda mel: 700 * (10 ** (np.asarray(mel) / 2595) - 1),
    ),
}
