# SPDX-License-Identifier: Apache-2.0
"""Gaussian diffusion as pure functions: schedules, noising, and the way back.

    q(x_t | x_0) = N(a_t x_0, (1 - a_t^2) I),   a_t = sqrt(prod_{s<=t} (1 - beta_s)),   a_0 = 1

A schedule is the table of signal levels a_0 .. a_T, computed in float64 on the host. Ho et al.,
"Denoising Diffusion Probabilistic Models", arXiv 2006.11239; continuous noise levels as in Saharia
et al., "Image Super-Resolution via Iterative Refinement", arXiv 2104.07636, Section 2.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array, PRNGKey

SCHEDULES = ("linear", "cosine")
"""Names that `betas` knows."""


def betas(
    name: str, steps: int, *, first: float = 1e-6, last: float = 1e-2, offset: float = 8e-3
) -> np.ndarray:
    """Return the variances beta_1 .. beta_T that the steps add.

    linear: evenly spaced.   cosine: 1 - f(t) / f(t - 1) up to 0.999, f(t) = cos^2((t / T + o) /
    (1 + o) pi / 2) (Nichol and Dhariwal, arXiv 2102.09672, Eq. 17).

    Args:
      name: one of `SCHEDULES`.
      steps: T, at least 1.
      first, last: of the linear schedule, in (0, 1).
      offset: o of the cosine schedule, at least 0.

    Returns:
      float64 `[T]`.

    Raises:
      ValueError: the name is unknown or a value is out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if not (0 < first < 1 and 0 < last < 1):
        raise ValueError(f"first={first}, last={last}: variances must be between 0 and 1")
    if offset < 0:
        raise ValueError(f"offset={offset}: must be at least 0")
    if name == "linear":
        return np.linspace(first, last, steps)
    angles = (np.arange(steps + 1) / steps + offset) / (1 + offset) * math.pi / 2
    kept = np.cos(angles) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999)


def signal_levels(variances: np.ndarray) -> np.ndarray:
    """Return a_0 .. a_T of variances `[T]`: float64 `[T + 1]`, falling from 1."""
    return np.sqrt(np.append(1.0, np.cumprod(1 - np.asarray(variances, np.float64))))


def stride_levels(levels: np.ndarray, steps: int) -> np.ndarray:
    """Return a shorter schedule of the same span, for sampling in fewer steps.

    Args:
      levels: `[T + 1]`, from `signal_levels`.
      steps: S, at most T.

    Returns:
      float64 `[S + 1]`: the levels at times T i / S, rounded; with S = T the schedule itself.

    Raises:
      ValueError: S is not in 1 .. T.
    """
    longest = len(levels) - 1
    if not 1 <= steps <= longest:
        raise ValueError(f"steps={steps}: must be in 1 to {longest}, the steps of the schedule")
    return np.asarray(levels, np.float64)[np.rint(np.linspace(0, longest, steps + 1)).astype(int)]


def sample_levels(key: PRNGKey, levels: np.ndarray, batch: int) -> Array:
    """Draw continuous signal levels to train at: t uniform, then a uniform in [a_t, a_(t-1)].

    Every example has its own t; the released code of SR3 draws one for the whole batch.

    Args:
      key: typed random key.
      levels: `[T + 1]`, from `signal_levels`.
      batch: b.

    Returns:
      float32 `[b]`.
    """
    time_key, place_key = jax.random.split(key)
    time = jax.random.randint(time_key, (batch,), 1, len(levels))
    place = jax.random.uniform(place_key, (batch,))
    table = jnp.asarray(levels, jnp.float32)
    return table[time] + place * (table[time - 1] - table[time])


def q_sample(clean: Array, noise: Array, level: Array) -> Array:
    """Add noise: a x_0 + sqrt(1 - a^2) noise.

    Args:
      clean: `[b, ...]`.
      noise: the same shape, standard normal.
      level: `[b]` signal levels a.

    Returns:
      The shape and dtype of `clean`.

    Raises:
      ValueError: the shapes do not fit.
    """
    if clean.shape != noise.shape or level.shape != clean.shape[:1]:
        raise ValueError(
            f"clean {clean.shape}, noise {noise.shape} and level {level.shape} must be [b, ...] "
            "twice and [b]"
        )
    level = level.reshape(-1, *(1,) * (clean.ndim - 1)).astype(clean.dtype)
    # 1 - a^2 would lose its digits where a is close to 1.
    return level * clean + jnp.sqrt((1 - level) * (1 + level)) * noise


def content_keys(seed: int, pixels: Array) -> PRNGKey:
    """Return a key per picture, a function of the seed and of what is in the picture.

    Noise drawn from it depends neither on the picture's place in a batch nor on the devices.

    Args:
      seed: any number.
      pixels: uint8 `[b, ...]`.

    Returns:
      Typed keys `[b]`.
    """
    pixels_bp = pixels.reshape(pixels.shape[0], -1).astype(jnp.uint32)
    # Odd weights that differ from place to place: shuffled pixels give another number. The sum of
    # integers is the same in any order, so it is on any number of devices.
    weight_p = (2 * jnp.arange(pixels_bp.shape[1], dtype=jnp.uint32) + 1) * jnp.uint32(
        2_654_435_769
    )
    number_b = jnp.sum(pixels_bp * weight_p, axis=1, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number_b)


class ReverseSteps(NamedTuple):
    """What the steps T, T - 1, .. 1 of a sampler multiply with; arrays `[T]` or, of one step, `[]`.

    Attributes:
      level: a_t, which the network is told.
      inverse, ratio: x_0 = inverse * x_t - ratio * noise.
      clean, noisy: mean of x_(t-1) = clean * x_0 + noisy * x_t.
      deviation: of the noise that is added to the mean; 0 in the last step.
    """

    level: Array
    inverse: Array
    ratio: Array
    clean: Array
    noisy: Array
    deviation: Array


def reverse_steps(levels: np.ndarray, eta: float = 1.0) -> ReverseSteps:
    """Return the coefficients of a sampler along a schedule.

    deviation^2 = eta^2 (1 - a_s^2) / (1 - a_t^2) (1 - a_t^2 / a_s^2),   s = t - 1
    noisy = sqrt((1 - a_s^2 - deviation^2) / (1 - a_t^2)),   clean = a_s - a_t noisy

    With eta = 1 that is the posterior of DDPM, with eta = 0 the deterministic DDIM (Song et al.,
    arXiv 2010.02502, Eq. 12 and 16).

    Args:
      levels: `[T + 1]`, from `signal_levels` or `stride_levels`.
      eta: share of the posterior's deviation, in [0, 1].

    Returns:
      float64 arrays `[T]` in the order of sampling.

    Raises:
      ValueError: eta is out of range, or the levels do not fall from 1 to above 0.
    """
    levels = np.asarray(levels, np.float64)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must be in [0, 1]")
    if levels.ndim != 1 or len(levels) < 2 or levels[0] != 1 or not (np.diff(levels) < 0).all():
        raise ValueError("levels must be a table that falls from 1")
    if levels[-1] <= 0:
        raise ValueError(f"the last level is {levels[-1]}: nothing of the signal is left to divide")
    now, after = levels[:0:-1], levels[-2::-1]
    lost, lost_after = 1 - now**2, 1 - after**2
    variance = eta**2 * lost_after / lost * (1 - (now / after) ** 2)
    noisy = np.sqrt(np.maximum(lost_after - variance, 0) / lost)
    return ReverseSteps(
        level=now,
        inverse=1 / now,
        ratio=np.sqrt(lost) / now,
        clean=after - now * noisy,
        noisy=noisy,
        deviation=np.sqrt(variance),
    )


def reverse_step(
    x: Array, predicted: Array, fresh: Array, step: ReverseSteps, *, clip: bool = True
) -> Array:
    """Go from x_t to x_(t-1).

    Args:
      x: x_t, `[b, ...]`.
      predicted: the noise that the network sees in it, same shape.
      fresh: standard normal noise, same shape.
      step: scalars of this step.
      clip: keep the clean picture that the prediction implies in [-1, 1].

    Returns:
      x_(t-1), the shape and dtype of `x`.
    """
    clean = step.inverse * x - step.ratio * predicted
    if clip:
        clean = jnp.clip(clean, -1, 1)
    return (step.clean * clean + step.noisy * x + step.deviation * fresh).astype(x.dtype)


def sample(
    denoise: Callable[[Array, Array], Array],
    keys: PRNGKey,
    shape: tuple[int, ...],
    levels: np.ndarray,
    *,
    eta: float = 1.0,
    clip: bool = True,
    dtype: jnp.dtype = jnp.float32,
) -> Array:
    """Turn noise into examples, one `lax.scan` over the steps of a schedule.

    Args:
      denoise: `(x_t [b, ...], level [b]) -> noise [b, ...]`.
      keys: typed keys `[b]`; an example depends on its own key alone.
      shape: of one example.
      levels: `[T + 1]`, from `signal_levels` or `stride_levels`.
      eta: see `reverse_steps`.
      clip: see `reverse_step`.
      dtype: of the examples and coefficients.

    Returns:
      `[b, *shape]`.

    Raises:
      ValueError: as `reverse_steps`.
    """
    steps = jax.tree.map(lambda x: jnp.asarray(x, dtype), reverse_steps(levels, eta))
    draw = jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), shape, dtype),
                    in_axes=(0, None))  # fmt: skip

    def one(x, now):
        i, step = now
        level = jnp.full(keys.shape, step.level)
        return reverse_step(x, denoise(x, level), draw(keys, i), step, clip=clip), None

    count = len(levels) - 1
    out, _ = jax.lax.scan(one, draw(keys, 0), (jnp.arange(1, count + 1), steps))
    return out
