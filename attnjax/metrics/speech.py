# SPDX-License-Identifier: Apache-2.0
"""Distance between two utterances of unequal speed: spectra compared along the best warping.

    cost(i, j) = distance(i, j) + min(cost(i, j - 1), cost(i - 1, j - 1), cost(i - 1, j))
    distance(i, j) = sqrt(mean_c (x_ic - y_jc)^2)

Weiss et al., "Wave-Tacotron", arXiv 2011.03568, as CAB (arXiv 2210.07661) reports them: the sum of
the last costs over all utterances, divided by the sum of synthesised frames.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnjax import audio
from attnjax.metrics.mean import Mean
from attnjax.typing import Array

CEPSTRA = 13
"""Coefficients of the mel-cepstral distortion, the mean (number 0) among them."""


def warped_cost(
    x: Array, y: Array, x_lengths: Array | None = None, y_lengths: Array | None = None
) -> Array:
    """Return the cost of the best warping of two sequences (see the module).

    All antidiagonals of the table are computed one after another, so that time is linear in t + s
    and memory, too.

    Args:
      x: `[b,t,c]` float.
      y: `[b,s,c]` float.
      x_lengths: int `[b]`, frames of x that exist, at least 1; all if None.
      y_lengths: int `[b]`, likewise.

    Returns:
      `[b]` float32.

    Raises:
      ValueError: shapes do not fit.
    """
    if x.ndim != 3 or y.ndim != 3 or x.shape[::2] != y.shape[::2]:
        raise ValueError(f"x {x.shape} and y {y.shape} are not [b,t,c] and [b,s,c]")
    (b, t, _), s = x.shape, y.shape[1]
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    x_lengths = jnp.full(b, t) if x_lengths is None else x_lengths
    y_lengths = jnp.full(b, s) if y_lengths is None else y_lengths
    rows = jnp.arange(t)
    # Position i of a diagonal needs frame (diagonal - i) of y: a window of y turned round.
    turned = jnp.pad(jnp.flip(y, axis=1), ((0, 0), (t, t), (0, 0)))

    def advance(carry, diagonal):
        last_bt, last_but_one_bt, result_b = carry
        columns = diagonal - rows
        y_btc = jax.lax.dynamic_slice_in_dim(turned, t + s - 1 - diagonal, t, axis=1)
        distance_bt = jnp.sqrt(jnp.mean(jnp.square(x - y_btc), axis=-1))
        above = lambda cost_bt: jnp.pad(cost_bt[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.inf)
        best_bt = jnp.minimum(last_bt, jnp.minimum(above(last_bt), above(last_but_one_bt)))
        best_bt = jnp.where(diagonal == 0, 0.0, best_bt)
        is_inside = (columns >= 0) & (columns < s)
        cost_bt = jnp.where(is_inside, distance_bt + best_bt, jnp.inf)
        own_b = jnp.take_along_axis(cost_bt, (x_lengths - 1)[:, None], axis=1)[:, 0]
        is_end = diagonal == x_lengths + y_lengths - 2
        return (cost_bt, last_bt, jnp.where(is_end, own_b, result_b)), None

    nowhere = jnp.full((b, t), jnp.inf)
    start = (nowhere, nowhere, jnp.zeros(b))
    (_, _, result_b), _ = jax.lax.scan(advance, start, jnp.arange(t + s - 1))
    return result_b


def mel_cepstral_distortion(
    reference: Array,
    synthesised: Array,
    rate: int,
    *,
    reference_lengths: Array | None = None,
    synthesised_lengths: Array | None = None,
    valid: Array | None = None,
) -> Mean:
    """Compare 13 mel-frequency cepstral coefficients (MCD).

    Args:
      reference: `[b, samples]` float waves.
      synthesised: `[b, samples']` float waves.
      rate: samples per second.
      reference_lengths: int `[b]`, samples that exist; all if None.
      synthesised_lengths: int `[b]`, likewise.
      valid: bool `[b]`, which utterances count; all if None.

    Returns:
      A state whose value is the cost per synthesised frame.
    """
    features = lambda spectrogram: audio.cepstrum(spectrogram, CEPSTRA)
    lengths = (reference_lengths, synthesised_lengths)
    return _distortion(features, (reference, synthesised), lengths, rate, valid)


def mel_spectral_distortion(
    reference: Array,
    synthesised: Array,
    rate: int,
    *,
    reference_lengths: Array | None = None,
    synthesised_lengths: Array | None = None,
    valid: Array | None = None,
) -> Mean:
    """Compare 80 log-mel bands (MSD); arguments as in `mel_cepstral_distortion`."""
    lengths = (reference_lengths, synthesised_lengths)
    return _distortion(lambda x: x, (reference, synthesised), lengths, rate, valid)


def _distortion(
    features: Callable[[Array], Array], waves, lengths, rate: int, valid: Array | None
) -> Mean:
    mel = audio.distortion_features(rate)
    lengths = [
        jnp.full(wave.shape[0], wave.shape[1]) if length is None else length
        for wave, length in zip(waves, lengths, strict=True)
    ]
    with jax.default_matmul_precision("float32"):  # Logarithms of small sums show every digit.
        x, y = (features(audio.log_mel(w, mel, n)) for w, n in zip(waves, lengths, strict=True))
    count = functools.partial(audio.frame_count, hop=mel.hop)
    x_frames, y_frames = (count(length) for length in lengths)
    cost_b = warped_cost(x, y, x_frames, y_frames)
    valid = jnp.ones(cost_b.shape, bool) if valid is None else valid
    # A row that does not count may hold anything, NaN too.
    return Mean(
        total=jnp.sum(jnp.where(valid, cost_b, 0)), weight=jnp.sum(jnp.where(valid, y_frames, 0))
    )
