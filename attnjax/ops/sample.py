# SPDX-License-Identifier: Apache-2.0
"""Resampling of pictures at fixed sizes."""

import functools

import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array

CUBIC = -0.75
"""The free coefficient of the cubic kernel; `jax.image.resize` uses -0.5 and antialiases."""


def bicubic_resize(image: Array, height: int, width: int) -> Array:
    """Resize pictures bicubically: half-pixel centres, a = -0.75, edge clamp, no antialiasing.

    out[y', x'] = sum_ij kernel(y - i) kernel(x - j) image[clamp(i), clamp(j)]
    with y = (y' + 1/2) * rows / height - 1/2, and x likewise. Both sums are products with a fixed
    interpolation matrix, so the gradient is exact and cheap.

    Args:
      image: `[b,y,x,c]` floating.
      height: rows of the result.
      width: columns of the result.

    Returns:
      `[b,height,width,c]` in the dtype of the image, computed in float32. An axis that keeps its
      size is passed through untouched.

    Raises:
      ValueError: the image is not of rank 4 or not floating, or a size is not positive.
    """
    if image.ndim != 4 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"image must be floating [b,y,x,c], got {image.dtype} {image.shape}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be positive, got {height} and {width}")
    rows, columns = image.shape[1:3]
    result = image
    if rows != height:
        matrix = jnp.asarray(_bicubic_matrix(rows, height), jnp.float32)
        result = jnp.einsum(
            "Yy,byxc->bYxc", matrix, result.astype(jnp.float32), precision="highest"
        )
    if columns != width:
        matrix = jnp.asarray(_bicubic_matrix(columns, width), jnp.float32)
        result = jnp.einsum(
            "Xx,byxc->byXc", matrix, result.astype(jnp.float32), precision="highest"
        )
    return result.astype(image.dtype)


@functools.lru_cache(maxsize=64)
def _bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Return `[new_size, size]` float64 weights of every old pixel in every new one."""
    centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centre).astype(np.int64)
    matrix = np.zeros((new_size, size))
    for tap in range(-1, 3):
        distance = np.abs(centre - (first + tap))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        column = np.clip(first + tap, 0, size - 1)
        np.add.at(matrix, (np.arange(new_size), column), np.where(distance <= 1, near, far))
    matrix.flags.writeable = False
    return matrix
