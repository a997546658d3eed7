# SPDX-License-Identifier: Apache-2.0
"""How much of two clouds of points agrees."""

import jax.numpy as jnp

from attnjax.typing import Array


def f_score(there: Array, back: Array, threshold: float = 0.01) -> Array:
    """Return the harmonic mean of precision and recall (Tatarchenko et al., arXiv 1905.03678).

    Precision is the share of predicted points that are nearer than the threshold to a true one,
    recall the share of true points that are nearer than it to a predicted one.

    Args:
      there: `[b,n]` squared distances from the prediction to the truth, see `ops.points`.
      back: `[b,m]` squared distances from the truth to the prediction.
      threshold: distance, not squared.

    Returns:
      float32 `[b]`, 0 if both are 0.
    """
    near = lambda squared: jnp.mean(squared < threshold**2, axis=-1, dtype=jnp.float32)
    precision, recall = near(there), near(back)
    total = precision + recall
    return jnp.where(total > 0, 2 * precision * recall / jnp.where(total > 0, total, 1), 0)
