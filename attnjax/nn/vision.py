# SPDX-License-Identifier: Apache-2.0
"""Picture-shaped helpers of vision models: frequency bands, patches, position tables."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from attnjax.ops.sample import bicubic_resize
from attnjax.typing import Array

BANDS = ("all", "highpass", "lowpass")
SIGMA = 2.0
"""Width in pixels of the Gaussian that separates the two bands."""


def band_filter(image: Array, band: str) -> Array:
    """Keep one band of spatial frequencies.

    lowpass = G * x; highpass = x - 2 G * x + G * G * x, with a Gaussian G of two pixels. The
    highpass is applied twice because one pass would leak a few percent of broad shapes.

    Args:
      image: `[b, y, x, c]`.
      band: one of `BANDS`.

    Returns:
      The filtered image, same shape and dtype; borders are mirrored.

    Raises:
      ValueError: the band is unknown.
    """
    if band not in BANDS:
        raise ValueError(f"band {band!r} is unknown; choose from {BANDS}")
    if band == "all":
        return image
    rows, columns = (jnp.asarray(_gaussian(size), image.dtype) for size in image.shape[1:3])

    def blur(x_byxc):
        return jnp.einsum("Yy,Xx,byxc->bYXc", rows, columns, x_byxc, precision="highest")

    if band == "lowpass":
        return blur(image)
    once = image - blur(image)
    return once - blur(once)


@functools.lru_cache(maxsize=16)
def _gaussian(size: int) -> np.ndarray:
    radius = math.ceil(4 * SIGMA)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    matrix = np.zeros((size, size))
    rows = np.arange(size)
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        # Mirror about the borders, as often as a small picture needs.
        column = np.mod(rows + offset, 2 * size)
        column = np.where(column < size, column, 2 * size - 1 - column)
        np.add.at(matrix, (rows, column), weight)
    return matrix


def extract_patches(image: Array, size: int, stride: int, padding: int) -> Array:
    """Cut overlapping patches; the soft split of token-to-token models.

    Args:
      image: `[b, y, x, c]`.
      size: side of a patch.
      stride: step between patches.
      padding: zeros added on every side.

    Returns:
      `[b, y', x', c * size * size]`, channel outermost as in PyTorch's unfold.
    """
    padded = jnp.pad(image, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows = (padded.shape[1] - size) // stride + 1
    columns = (padded.shape[2] - size) // stride + 1
    shifts = [
        padded[:, y : y + (rows - 1) * stride + 1 : stride,
               x : x + (columns - 1) * stride + 1 : stride]
        for y in range(size) for x in range(size)
    ]  # fmt: skip
    return jnp.stack(shifts, axis=-1).reshape(image.shape[0], rows, columns, -1)


def interpolate_positions(table: Array, grid: tuple[int, int], *, extra: int = 1) -> Array:
    """Resize a learned position table to another grid, bicubically, for another image size.

    Args:
      table: `[1, extra + p, d]`; p must be a square number.
      grid: new rows and columns.
      extra: leading entries that have no place on the grid (class tokens); kept as they are.

    Returns:
      `[1, extra + rows * columns, d]`.

    Raises:
      ValueError: the table's patches do not form a square.
    """
    side = math.isqrt(table.shape[1] - extra)
    if side * side != table.shape[1] - extra:
        raise ValueError(f"{table.shape[1] - extra} positions do not form a square grid")
    if tuple(grid) == (side, side):
        return table
    grid_byxd = table[:, extra:].reshape(1, side, side, -1)
    resized_byxd = bicubic_resize(grid_byxd, *grid)
    return jnp.concatenate(
        [table[:, :extra], resized_byxd.reshape(1, grid[0] * grid[1], -1)], axis=1
    )


def fit_positions(array: Array, shape: tuple[int, ...]) -> Array:
    """Fit a learned position table `[1, 1 + p, d]` to another image size, bicubically.

    Args:
      array: the table; its first entry, that of a class token, is kept.
      shape: what is wanted.

    Returns:
      float32 of the wanted shape; the array as it is if one of the two is no such table.
    """
    side = math.isqrt(shape[1] - 1) if len(shape) == 3 else 0
    is_table = array.ndim == 3 and array.shape[::2] == tuple(shape)[::2] and side**2 == shape[1] - 1
    if not is_table:
        return array
    return interpolate_positions(jnp.asarray(array, jnp.float32), (side, side))
