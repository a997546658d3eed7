# SPDX-License-Identifier: Apache-2.0
"""Cross entropy with soft targets and label smoothing, over `optax.losses`."""

import jax
import jax.numpy as jnp
import optax

from attnjax.typing import Array


def soft_targets(labels: Array, classes: int, *, label_smoothing: float = 0.0) -> Array:
    """Return smoothed one-hot targets: `(1 - a) * onehot + a / v` for smoothing a, v classes.

    The true class gets `1 - a + a / v`, every other class `a / v`, as in the DeiT recipe.

    Args:
      labels: `[b]` integers in `[0, classes)`. A label outside makes its row NaN, so that the loss
        is NaN: `jax.nn.one_hot` alone would turn it into a silent zero loss.
      classes: number of classes v.
      label_smoothing: a, in `[0, 1)`.

    Returns:
      `[b, v]` float32 rows that sum to one.
    """
    targets = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    targets = optax.losses.smooth_labels(targets, label_smoothing)
    known = (labels >= 0) & (labels < classes)
    return jnp.where(known[:, None], targets, jnp.nan)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Return `-sum_v targets * log_softmax(logits)` of each example, in float32.

    Args:
      logits: `[b, v]`, any floating dtype.
      targets: `[b, v]` probabilities.

    Returns:
      `[b]` float32.

    Raises:
      ValueError: the shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"logits {logits.shape} and targets {targets.shape} differ in shape")
    return optax.losses.softmax_cross_entropy(
        logits.astype(jnp.float32), targets.astype(jnp.float32)
    )
