# SPDX-License-Identifier: Apache-2.0
"""Diffusion whose network says how wide a step back is, too: its loss, and samples from it.

    log variance = v log beta_t + (1 - v) log posterior_t,   v the network's share
    loss = |noise - network|^2 + variational bound of the variance alone / 1000

Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672, Eq. 15
and 16, as DiT (arXiv 2212.09748) trains; schedules and steps are those of `ops.diffusion`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.ops.diffusion import ReverseSteps, reverse_step, reverse_steps
from attnjax.typing import Array, PRNGKey

PIXEL = 1 / 255
"""Half the distance of two of the 256 values of a pixel in [-1, 1]."""

EDGE = 0.999
"""Beyond it a pixel is black or white, and stands for all that is darker or lighter."""

LEAST = 1e-12
"""Probabilities below it count as this one."""


class LearnedSteps(NamedTuple):
    """Steps T, T - 1, .. 1 of a sampler; arrays `[T]`, or what they are broadcast to.

    Attributes:
      time: what the network is told, 0 for the least noise.
      step: what a step multiplies with.
      low, high: logarithms of the least and the largest variance.
    """

    time: Array
    step: ReverseSteps
    low: Array
    high: Array


def space_times(longest: int, steps: int) -> np.ndarray:
    """Choose the times of a shorter sampler: i (T - 1) / (S - 1), rounded.

    Halves go where float64 sums of the stride lead, as in the code that released models sample by.

    Args:
      longest: T, steps of the schedule.
      steps: S, at least 2.

    Returns:
      int `[S]`, growing from 0 to T - 1.

    Raises:
      ValueError: S is not in 2 .. T.
    """
    if not 2 <= steps <= longest:
        raise ValueError(f"steps={steps}: must be in 2 to {longest}, the steps of the schedule")
    stride = (longest - 1) / (steps - 1)
    return np.rint(np.cumsum([0.0, *(stride,) * (steps - 1)])).astype(int)


def spaced_levels(levels: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the signal levels of chosen times, after level 1.

    Args:
      levels: `[T + 1]`, from `diffusion.signal_levels`.
      times: int `[S]`, growing, in 0 .. T - 1.

    Returns:
      float64 `[S + 1]`.

    Raises:
      ValueError: the times are no such numbers.
    """
    times = np.asarray(times)
    is_fine = times.ndim == 1 and len(times) > 1 and (np.diff(times) > 0).all()
    if not is_fine or times[0] < 0 or times[-1] > len(levels) - 2:
        raise ValueError(f"times must grow within 0 to {len(levels) - 2}, at least two")
    return np.append(1.0, np.asarray(levels, np.float64)[times + 1])


def learned_steps(levels: np.ndarray, times: np.ndarray | None = None) -> LearnedSteps:
    """Return the coefficients of all steps of a schedule, or of chosen times.

    The posterior of the last step has no variance; its logarithm is that of the step before.

    Args:
      levels: `[T + 1]`, from `diffusion.signal_levels`.
      times: int `[S]` such as from `space_times`; None: all.

    Returns:
      float64 arrays `[S]`, in the order of sampling: row i belongs to time number S - 1 - i.

    Raises:
      ValueError: as `spaced_levels` and `diffusion.reverse_steps`.
    """
    times = np.arange(len(levels) - 1) if times is None else np.asarray(times)
    table = spaced_levels(levels, times)
    step = reverse_steps(table)
    posterior = np.append(step.deviation[:-1], step.deviation[-2]) ** 2
    now, after = table[:0:-1], table[-2::-1]
    return LearnedSteps(
        time=times[::-1].astype(np.float64),
        step=step,
        low=np.log(posterior),
        high=np.log((1 - now / after) * (1 + now / after)),
    )


def at_time(steps: LearnedSteps, index: Array, rank: int) -> LearnedSteps:
    """Pick a step for every example.

    Args:
      steps: arrays `[T]`.
      index: integers `[b]` in 0 .. T - 1, 0 for the least noise.
      rank: of what they will multiply.

    Returns:
      float32 `[b, 1, ..]` of that rank; `time` `[b]`.
    """

    def pick(table):
        return jnp.asarray(table, jnp.float32)[len(table) - 1 - index]

    picked = jax.tree.map(pick, steps)
    shape = (-1, *(1,) * (rank - 1))
    return jax.tree.map(lambda x: x.reshape(shape), picked)._replace(time=picked.time)


def moments(
    x: Array, noise: Array, share: Array, at: LearnedSteps, *, clip: bool = False
) -> tuple[Array, Array]:
    """Return mean and log variance of x_(t-1) as the network sees them.

    Args:
      x: x_t, `[b, ...]`.
      noise: that it sees, the same shape.
      share: -1 for the least variance, 1 for the largest, unbounded, the same shape.
      at: coefficients that broadcast against `x`.
      clip: keep the clean picture that the noise implies in [-1, 1].

    Returns:
      Two arrays of the shape of `x`.
    """
    clean = at.step.inverse * x - at.step.ratio * noise
    if clip:
        clean = jnp.clip(clean, -1, 1)
    share = (share + 1) / 2
    log_variance = share * at.high + (1 - share) * at.low
    return at.step.clean * clean + at.step.noisy * x, log_variance


def variational_bound(
    clean: Array, x: Array, noise: Array, share: Array, at: LearnedSteps
) -> Array:
    """Return one term of the variational bound, in bits per number.

    KL(q(x_(t-1) | x_t, x_0) | p(x_(t-1) | x_t)); at time 0 -log p(x_0 | x_1), where a number stands
    for the 256th part of [-1, 1] around it.

    Args:
      clean: x_0, `[b, ...]`.
      x: x_t, the same shape.
      noise, share: see `moments`.
      at: of every example, from `at_time`.

    Returns:
      float32 `[b]`.
    """
    axes = tuple(range(1, clean.ndim))
    mean, log_variance = moments(x, noise, share, at)
    true_mean = at.step.clean * clean + at.step.noisy * x
    gap = at.low - log_variance
    apart = jnp.square(true_mean - mean) * jnp.exp(-log_variance)
    divergence = 0.5 * (jnp.exp(gap) - 1 - gap + apart)
    surprise = -_log_likelihood(clean, mean, 0.5 * log_variance)
    nats_b = jnp.where(at.time == 0, jnp.mean(surprise, axis=axes), jnp.mean(divergence, axis=axes))
    return nats_b / math.log(2)


def losses(
    clean: Array, x: Array, added: Array, noise: Array, share: Array, at: LearnedSteps
) -> tuple[Array, Array]:
    """Return squared errors of the noise and the bound; only the shares learn from the latter.

    Args:
      clean: x_0, `[b, ...]`.
      x: x_t, the same shape.
      added: the noise in it.
      noise, share: what the network answers, see `moments`.
      at: of every example, from `at_time`.

    Returns:
      Two of float32 `[b]`; the loss is their sum for T = 1000 steps (see `tasks.class_diffusion`).
    """
    squares_b = jnp.mean(jnp.square(added - noise), axis=tuple(range(1, clean.ndim)))
    return squares_b, variational_bound(clean, x, jax.lax.stop_gradient(noise), share, at)


def guide(conditional: Array, unconditional: Array, scale: float, channels: int) -> Array:
    """Push the first channels away from what the network says without a class.

    u + scale (c - u)   (Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598)

    Args:
      conditional: c, `[..., channels]`, an answer with the class.
      unconditional: u, the one without, the same shape.
      scale: 1 changes nothing.
      channels: how many are guided; the others stay those of `conditional`. The release of DiT
        guides 3, although its latents have 4.

    Returns:
      The shape of `conditional`.
    """
    guided = unconditional + scale * (conditional - unconditional)
    return jnp.concatenate([guided[..., :channels], conditional[..., channels:]], axis=-1)


def sample(
    predict: Callable[[Array, Array], tuple[Array, Array]],
    keys: PRNGKey,
    shape: tuple[int, ...],
    levels: np.ndarray,
    times: np.ndarray | None = None,
    *,
    eta: float | None = None,
    clip: bool = False,
    dtype: jnp.dtype = jnp.float32,
) -> Array:
    """Turn noise into examples, one `lax.scan` over the steps of a schedule.

    Args:
      predict: `(x_t [b, ...], time [b]) -> (noise, share)`, both `[b, ...]`; see `moments`.
      keys: typed keys `[b]`; an example depends on its own key alone.
      shape: of one example.
      levels: `[T + 1]`, from `diffusion.signal_levels`.
      times: see `learned_steps`.
      eta: None: steps are as wide as the network says; else as in `diffusion.reverse_steps`, 0 for
        the deterministic DDIM.
      clip: keep implied clean pictures in [-1, 1].
      dtype: of the examples and coefficients.

    Returns:
      `[b, *shape]`.

    Raises:
      ValueError: as `learned_steps` and `diffusion.reverse_steps`.
    """
    steps = learned_steps(levels, times)
    if eta is not None:
        kept = np.arange(len(levels) - 1) if times is None else times
        steps = steps._replace(step=reverse_steps(spaced_levels(levels, kept), eta))
    count = len(steps.time)
    # Nothing is added to the mean of the last step.
    is_noisy = np.arange(count) < count - 1
    steps = jax.tree.map(lambda x: jnp.asarray(x, dtype), steps)
    draw = jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), shape, dtype),
                    in_axes=(0, None))  # fmt: skip

    def one(x, now):
        i, at, adds = now
        noise, share = predict(x, jnp.full(keys.shape, at.time))
        fresh = draw(keys, i)
        if eta is not None:
            return reverse_step(x, noise, fresh, at.step, clip=clip), None
        mean, log_variance = moments(x, noise, share, at, clip=clip)
        spread = jnp.where(adds, jnp.exp(0.5 * log_variance), 0)
        return (mean + spread * fresh).astype(dtype), None

    numbers = jnp.arange(1, count + 1)
    out, _ = jax.lax.scan(one, draw(keys, 0), (numbers, steps, jnp.asarray(is_noisy)))
    return out


def _log_likelihood(x, mean, log_deviation):
    """Log probability of the interval of a pixel's value under a normal distribution."""
    inverse = jnp.exp(-log_deviation)
    above, below = (_normal_cdf(inverse * (x - mean + edge)) for edge in (PIXEL, -PIXEL))
    log = lambda p: jnp.log(jnp.maximum(p, LEAST))
    inside = log(above - below)
    return jnp.where(x < -EDGE, log(above), jnp.where(x > EDGE, log(1 - below), inside))


def _normal_cdf(x):
    """The approximation by tanh that all of this line of code uses."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
