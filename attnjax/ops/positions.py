# SPDX-License-Identifier: Apache-2.0
"""What is done to queries and keys before they meet: rotary positions, sinusoids, norms."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.typing import Array

LAYOUTS = ("half", "interleaved")
"""Which numbers form a pair: i and i + width / 2 (LLaMA, NeoX), or 2 i and 2 i + 1 (GPT-J)."""


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What rotary positions are like; a value, so that layers can carry it.

    Attributes:
      base: the longest wavelength is 2 pi times (almost) this.
      layout: member of `LAYOUTS`.
      scaling: (factor, low, high, length), how LLaMA 3.1 stretches what was trained on a `length`:
        wavelengths above length / low by the factor, those below length / high not at all, and
        frequencies between them by what lies between; None: not at all.
    """

    base: float = 10_000.0
    layout: str = "half"
    scaling: tuple[float, float, float, float] | None = None

    def __post_init__(self):
        _check_layout(self.layout)
        if not self.base > 0:
            raise ValueError(f"base={self.base}: must be positive")
        if self.scaling is None:
            return
        object.__setattr__(self, "scaling", tuple(self.scaling))
        is_fine = len(self.scaling) == 4 and min(self.scaling) > 0
        if not is_fine or self.scaling[1] >= self.scaling[2]:
            raise ValueError(
                f"scaling={self.scaling}: must be (factor, low, high, length), all positive, with "
                "low < high"
            )

    @classmethod
    def of(cls, value: Any) -> "Rotary":
        """Return a `Rotary` from one, from its base, or from a mapping of its fields.

        Raises:
          ValueError: a field is unknown or out of range.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(value)
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is no field of rotary positions: {', '.join(known)}")
        return cls(**value)

    def turn(self, x: Array, positions: Array) -> Array:
        """Rotate `x [b,t,n,h]`, see `rotate`."""
        return rotate(x, positions, base=self.base, layout=self.layout, scaling=self.scaling)


def rotate(
    x: Array,
    positions: Array,
    *,
    base: float = 10_000.0,
    layout: str = "half",
    width: int | None = None,
    scaling: tuple[float, float, float, float] | None = None,
) -> Array:
    """Rotate pairs of numbers by angles proportional to position (RoPE, arXiv 2104.09864, Eq. 15).

    (a, b) -> (a cos w - b sin w, a sin w + b cos w),  w = position * base^(-2 i / width)

    Args:
      x: `[b,t,n,h]` queries or keys.
      positions: `[t]` or `[b,t]`, integer or floating; need not be consecutive.
      base: the longest wavelength is 2 pi times (almost) this.
      layout: one of `LAYOUTS`; "half" and "interleaved" differ by a permutation of the columns.
      width: numbers of a head that are rotated, the first ones; all if None.
      scaling: see `Rotary`.

    Returns:
      `[b,t,n,h]` in the dtype of x, computed in float32.

    Raises:
      ValueError: the width is odd or exceeds h, the layout is unknown, or positions do not fit.
    """
    b, t, _, h = x.shape
    width = h if width is None else width
    if width % 2 or not 0 < width <= h:
        raise ValueError(f"width={width} must be even and at most the head width {h}")
    _check_layout(layout)
    positions = jnp.asarray(positions)
    if positions.shape not in ((t,), (1, t), (b, t)):
        raise ValueError(f"positions must be [t] or [b,t] = ({b}, {t}), got {positions.shape}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = _angles(positions.reshape(-1, t), width, base, wide, scaling)[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned, rest = x[..., :width].astype(wide), x[..., width:]
    pairs = turned.reshape(*x.shape[:-1], *_pair_shape(layout, width))
    first, second = jnp.moveaxis(pairs, -2 if layout == "half" else -1, 0)
    pairs = jnp.stack(
        [first * cos - second * sin, first * sin + second * cos],
        axis=-2 if layout == "half" else -1,
    )
    return jnp.concatenate([pairs.reshape(turned.shape).astype(x.dtype), rest], axis=-1)


def sinusoids(
    positions: Array, width: int, *, base: float = 10_000.0, layout: str = "interleaved"
) -> Array:
    """Return fixed position vectors (Vaswani et al., arXiv 1706.03762, Section 3.5).

    Args:
      positions: `[...]`, integer or floating.
      width: even width of a vector.
      base: see `rotate`.
      layout: "interleaved": sine and cosine in turns, as in the paper; "half": all sines, then all
        cosines.

    Returns:
      `[..., width]` float32.

    Raises:
      ValueError: the width is odd or the layout unknown.
    """
    if width % 2 or width < 2:
        raise ValueError(f"width={width} must be even and positive")
    _check_layout(layout)
    angle = _angles(jnp.asarray(positions), width, base, jnp.float32)
    axis = -2 if layout == "half" else -1
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=axis)
    return pairs.reshape(*angle.shape[:-1], width)


def segment_positions(ids: Array) -> Array:
    """Count positions from 0 in every run of equal segment ids.

    Args:
      ids: integers `[t]` or `[b,t]`; may be traced.

    Returns:
      int32 of the same shape.
    """
    ids = jnp.asarray(ids)
    index = jnp.broadcast_to(jnp.arange(ids.shape[-1], dtype=jnp.int32), ids.shape)
    is_start = jnp.concatenate(
        [jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=-1
    )
    return index - jax.lax.cummax(jnp.where(is_start, index, 0), axis=ids.ndim - 1)


def query_key_norm(
    query: Array,
    key: Array,
    *,
    kind: str = "rms",
    query_scale: Array | None = None,
    key_scale: Array | None = None,
    epsilon: float = 1e-6,
) -> tuple[Array, Array]:
    """Normalise queries and keys over the width of their heads, before rotary positions.

    rms: x / sqrt(mean x^2 + epsilon) (arXiv 2302.05442 and later);  l2: x / sqrt(sum x^2 + epsilon)
    (arXiv 2010.04245, whose scale of the scores is learnt: give it as `query_scale`).

    Args:
      query: `[b,t,n,h]`.
      key: `[b,s,k,h]`.
      kind: "rms" or "l2".
      query_scale: learnt factor that broadcasts to `[n,h]`: `[h]`, `[n,h]` or `[n,1]`; or None.
      key_scale: the same for `[k,h]`.
      epsilon: keeps the derivative at 0 finite.

    Returns:
      query and key in their own dtypes, computed in float32.

    Raises:
      ValueError: the kind is unknown, or a scale does not fit.
    """
    if kind not in ("rms", "l2"):
        raise ValueError(f"kind {kind!r} is neither 'rms' nor 'l2'")
    reduce = jnp.mean if kind == "rms" else jnp.sum
    results = []
    for name, x, scale in (("query", query, query_scale), ("key", key, key_scale)):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normal = wide * jax.lax.rsqrt(reduce(wide * wide, axis=-1, keepdims=True) + epsilon)
        if scale is not None:
            scale = jnp.asarray(scale)
            if not _broadcasts(scale.shape, x.shape[2:]):
                raise ValueError(f"{name}_scale {scale.shape} does not fit heads {x.shape[2:]}")
            normal = normal * scale.reshape((1,) * (4 - scale.ndim) + scale.shape)
        results.append(normal.astype(x.dtype))
    return results[0], results[1]


def _angles(positions, width, base, dtype, scaling=None):
    frequency = base ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    if scaling is not None:
        factor, low, high, length = scaling
        turns = length * frequency / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    return positions[..., None].astype(dtype) * frequency


def _pair_shape(layout, width):
    return (2, width // 2) if layout == "half" else (width // 2, 2)


def _check_layout(layout):
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose from {LAYOUTS}")


def _broadcasts(shape, whole):
    return len(shape) <= len(whole) and all(
        size in (1, to) for size, to in zip(shape[::-1], whole[::-1], strict=False)
    )
