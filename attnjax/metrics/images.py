# SPDX-License-Identifier: Apache-2.0
"""How close two pictures are: peak signal-to-noise ratio and structural similarity.

    PSNR = 10 log10(peak^2 / mean squared difference)
    SSIM = mean of (2 m_a m_b + C_1) (2 s_ab + C_2) / ((m_a^2 + m_b^2 + C_1) (s_a^2 + s_b^2 + C_2))

m, s^2 and s_ab are means, variances and covariance under a Gaussian window, wherever the window
lies inside the picture; C_1 = (0.01 peak)^2, C_2 = (0.03 peak)^2. Wang et al., "Image Quality
Assessment: From Error Visibility to Structural Similarity", doi:10.1109/TIP.2003.819861.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array

PEAK = 255.0


def to_uint8(picture: Array) -> Array:
    """Return pixels 0 to 255 of a picture in [-1, 1], rounded; outside of it they are clipped."""
    return jnp.round((jnp.clip(picture, -1, 1) + 1) * (PEAK / 2)).astype(jnp.uint8)


def psnr(picture: Array, reference: Array) -> Array:
    """Return the peak signal-to-noise ratio in dB.

    Args:
      picture: uint8 `[b, y, x, c]`.
      reference: uint8, the same shape.

    Returns:
      float32 `[b]`; infinite where the pictures are equal.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    _check(picture, reference)
    difference = picture.astype(jnp.float32) - reference.astype(jnp.float32)
    error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return -10 * jnp.log10(error / PEAK**2)


def ssim(picture: Array, reference: Array, *, window: int = 11, sigma: float = 1.5) -> Array:
    """Return the structural similarity, averaged over places and channels.

    Args:
      picture: uint8 `[b, y, x, c]`.
      reference: uint8, the same shape.
      window: side of the Gaussian window, odd, at most the sides of the picture.
      sigma: its deviation in pixels.

    Returns:
      float32 `[b]`, 1 where the pictures are equal.

    Raises:
      ValueError: shapes or dtypes do not fit, or the window does not fit into the picture.
    """
    _check(picture, reference)
    rows, columns = picture.shape[1:3]
    if window < 1 or window % 2 == 0 or window > min(rows, columns):
        raise ValueError(
            f"window={window}: must be odd and at most the sides of the picture, {rows}x{columns}"
        )
    down, across = (_windows(size, window, sigma) for size in (rows, columns))
    blur = lambda x: jnp.einsum(
        "py,byxc,qx->bpqc", down, x, across, precision=jax.lax.Precision.HIGHEST
    )
    # Second moments about the middle of the range: squares stay small, and more digits are left.
    a, b = (x.astype(jnp.float32) - PEAK / 2 for x in (picture, reference))
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + PEAK / 2, mean_b + PEAK / 2
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    same = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    all_of_it = (mean_a**2 + mean_b**2 + c1) * (variances + c2)
    return jnp.mean(same / all_of_it, axis=(1, 2, 3))


def _windows(size, window, sigma):
    """Return the matrix `[places, size]` whose rows are the Gaussian at every place it fits."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    places = size - window + 1
    matrix = np.zeros((places, size), np.float32)
    for place in range(places):
        matrix[place, place : place + window] = weights / weights.sum()
    return jnp.asarray(matrix)


def _check(picture, reference):
    if picture.shape != reference.shape or picture.ndim != 4:
        raise ValueError(
            f"pictures {picture.shape} and {reference.shape} must be [b, y, x, c] alike"
        )
    if picture.dtype != jnp.uint8 or reference.dtype != jnp.uint8:
        raise ValueError(f"pictures are {picture.dtype} and {reference.dtype}, expected uint8")
