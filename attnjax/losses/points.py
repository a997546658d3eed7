# SPDX-License-Identifier: Apache-2.0
"""Chamfer distances of clouds of points, from the squared distances of `ops.points`.

Yuan et al., "PCN: Point Completion Network", arXiv 1808.00671, Eq. 1: the mean distance of a point
to the nearest one of the other cloud, both ways.
"""

import jax.numpy as jnp

from attnjax.typing import Array


def chamfer_l1(there: Array, back: Array) -> Array:
    """Return the mean of both mean distances.

    (mean_i d_i + mean_j d_j) / 2

    Args:
      there: `[b,n]` squared distances from the first cloud to the second.
      back: `[b,m]` squared distances from the second cloud to the first.

    Returns:
      float32 `[b]`; points that coincide have gradient 0.
    """
    return (jnp.mean(_root(there), axis=-1) + jnp.mean(_root(back), axis=-1)) / 2


def chamfer_l2(there: Array, back: Array) -> Array:
    """Return the sum of both mean squared distances: mean_i d_i^2 + mean_j d_j^2.

    Args:
      there: `[b,n]` squared distances from the first cloud to the second.
      back: `[b,m]` squared distances from the second cloud to the first.

    Returns:
      float32 `[b]`.
    """
    return jnp.mean(there, axis=-1) + jnp.mean(back, axis=-1)


def _root(squared):
    """The square root, whose gradient at 0 is 0 instead of infinite."""
    is_apart = squared > 0
    return jnp.where(is_apart, jnp.sqrt(jnp.where(is_apart, squared, 1)), 0)
