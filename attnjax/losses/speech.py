# SPDX-License-Identifier: Apache-2.0
"""Losses of speech synthesis, as CAB (arXiv 2210.07661) trains: errors by place, and their means.

FastSpeech 2 (arXiv 2006.04558):  |mel| + (log(duration + 1))^2 + pitch^2 + energy^2
Transformer-TTS (arXiv 1809.08895):  |mel| + mel^2, before and after the postnet, + cross entropy of
the end, in which the one last step counts several times.

Every term is the mean over the places of a batch that exist.
"""

import jax
import jax.numpy as jnp

from attnjax.typing import Array

Error = tuple[Array, Array]
"""Errors at every place, float32, and bool of the same shape: which places count."""


def mel_error(predicted: Array, target: Array, valid: Array, *, squared: bool = False) -> Error:
    """Compare spectrograms: the mean over bands of |error|, or of its square.

    Args:
      predicted: `[b,t,c]` float.
      target: `[b,t,c]` float.
      valid: bool `[b,t]`, frames that exist.
      squared: which of the two.

    Returns:
      The error `[b,t]`, and `valid`.
    """
    difference = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    size = jnp.square(difference) if squared else jnp.abs(difference)
    return _counted(jnp.mean(size, axis=-1), valid)


def duration_error(log_duration: Array, duration: Array, valid: Array) -> Error:
    """Compare durations on a logarithmic scale: (log_duration - log(duration + 1))^2.

    Args:
      log_duration: `[b,s]` float, predicted.
      duration: int `[b,s]`, frames.
      valid: bool `[b,s]`.

    Returns:
      The error `[b,s]`, and `valid`.
    """
    return squared_error(log_duration, jnp.log1p(duration.astype(jnp.float32)), valid)


def squared_error(predicted: Array, target: Array, valid: Array) -> Error:
    """Compare numbers `[b,s]`; returns the squared error, and `valid`."""
    difference = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    return _counted(jnp.square(difference), valid)


def end_error(logits: Array, steps: Array, *, weight: float = 5.0) -> Error:
    """Ask at every step whether it is the last one.

    -weight log sigmoid(logit) at the last step, -log(1 - sigmoid(logit)) before it

    Args:
      logits: `[b,t]` float.
      steps: int `[b]`, how many steps exist, at least 1.
      weight: of the last step.

    Returns:
      The error `[b,t]`, and which steps exist.
    """
    logits, step = logits.astype(jnp.float32), jnp.arange(logits.shape[1])
    is_last = step == steps[:, None] - 1
    error = jnp.where(is_last, weight * jax.nn.softplus(-logits), jax.nn.softplus(logits))
    return _counted(error, step < steps[:, None])


def mean_error(error: Error) -> Array:
    """Return the mean over the places that count, 0 if there are none."""
    values, valid = error
    return jnp.sum(values) / jnp.maximum(jnp.sum(valid), 1)


def _counted(error, valid):
    """Padding may hold anything, NaN too."""
    return jnp.where(valid, error, 0), valid
