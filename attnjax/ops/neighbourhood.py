# SPDX-License-Identifier: Apache-2.0
"""Attention of every place of a picture to the places around it.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132, Section
3.2: such weights share one softmax with those of coarser keys, so the log-sum-exp comes back, to be
merged with `ops.merge.merge_partials`.
"""

import jax.numpy as jnp
import numpy as np

from attnjax.ops.normalizer import softmax
from attnjax.typing import Array


def neighbours(x: Array, window: int) -> Array:
    """Return what lies around every place, row by row; zero beyond the border.

    Args:
      x: `[b, y, x, ...]`.
      window: side w of the square around a place, odd.

    Returns:
      `[b, y, x, w * w, ...]`.

    Raises:
      ValueError: the window is even or not positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: must be odd and positive")
    height, width = x.shape[1:3]
    reach = window // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), *[(0, 0)] * (x.ndim - 3)))
    views = [
        padded[:, dy : dy + height, dx : dx + width] for dy in range(window) for dx in range(window)
    ]
    return jnp.stack(views, axis=3)


def inside(height: int, width: int, window: int) -> np.ndarray:
    """Return which of the places around every place lie in the picture, bool `[y, x, w * w]`."""
    offset = np.arange(window) - window // 2
    rows = np.arange(height)[:, None] + offset
    columns = np.arange(width)[:, None] + offset
    is_row, is_column = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    both = is_row[:, None, :, None] & is_column[None, :, None, :]
    return both.reshape(height, width, window * window)


def neighbourhood_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int,
    bias: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """Attend from every place to the window around it, as far as it lies in the picture.

    Args:
      query: `[b,y,x,n,h]`.
      key: `[b,y,x,n,h]`.
      value: `[b,y,x,n,hv]`.
      window: side w of the window, odd.
      bias: `[n, w * w]`, added to the scores.
      scale: factor of the scores; `h ** -0.5` if None.

    Returns:
      `out [b, y * x, n, hv]` in the dtype of the query, and its log-sum-exp `[b, n, y * x]`.

    Raises:
      ValueError: shapes do not fit, or the window is even.
    """
    b, height, width, n, h = query.shape
    if key.shape != query.shape or value.shape[:4] != query.shape[:4]:
        raise ValueError(f"query {query.shape}, key {key.shape}, value {value.shape} do not fit")
    if bias is not None and bias.shape != (n, window * window):
        raise ValueError(f"bias {bias.shape} must be {(n, window * window)}")
    scale = h**-0.5 if scale is None else scale
    scores_byxnw = scale * jnp.einsum(
        "byxnh,byxwnh->byxnw", query, neighbours(key, window), preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores_byxnw = scores_byxnw + bias
    is_inside = inside(height, width, window)[:, :, None]
    weights_byxnw, lse_byxn = softmax(jnp.where(is_inside, scores_byxnw, -jnp.inf))
    out = mix_neighbours(weights_byxnw.astype(value.dtype), value, window)
    lse_bnt = jnp.moveaxis(lse_byxn.reshape(b, height * width, n), 1, 2)
    return out.astype(query.dtype), lse_bnt


def mix_neighbours(weights: Array, value: Array, window: int) -> Array:
    """Add up the values around every place.

    Args:
      weights: `[b,y,x,n,w * w]`.
      value: `[b,y,x,n,hv]`.
      window: side w.

    Returns:
      `[b, y * x, n, hv]`.
    """
    b, height, width, n, hv = value.shape
    out = jnp.einsum("byxnw,byxwnh->byxnh", weights, neighbours(value, window))
    return out.reshape(b, height * width, n, hv)
