# SPDX-License-Identifier: Apache-2.0
"""Learned variances against the formulas in terms of beta, in float64, and against closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import diffusion
from attnjax.ops import learned_variance as lv

EXACT = 1e-9  # float64 sums in another order, relative
SUMS = 2e-5  # float32, relative to values of size 1


@functools.cache
def levels(steps=1_000):
    return diffusion.signal_levels(diffusion.betas("linear", steps, first=1e-4, last=2e-2))


class Oracle:
    """Tables by beta as the paper writes them, index 0 for the least noise."""

    def __init__(self, kept=None):
        total = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1_000))
        self.kept = np.arange(1_000) if kept is None else np.asarray(kept)
        self.bar = total[self.kept]
        self.before = np.append(1.0, self.bar[:-1])
        self.beta = 1 - self.bar / self.before
        posterior = self.beta * (1 - self.before) / (1 - self.bar)
        self.low = np.log(np.append(posterior[1], posterior[1:]))
        self.high = np.log(self.beta)
        self.clean = self.beta * np.sqrt(self.before) / (1 - self.bar)
        self.noisy = (1 - self.before) * np.sqrt(1 - self.beta) / (1 - self.bar)

    def moments(self, x, noise, share, t, clip=False):
        clean = x / np.sqrt(self.bar[t]) - np.sqrt(1 / self.bar[t] - 1) * noise
        clean = np.clip(clean, -1, 1) if clip else clean
        part = (share + 1) / 2
        log_variance = part * self.high[t] + (1 - part) * self.low[t]
        return self.clean[t] * clean + self.noisy[t] * x, log_variance

    def bound(self, clean, x, noise, share, t):
        mean, log_variance = self.moments(x, noise, share, t)
        if t == 0:
            cdf = lambda z: 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            scale = np.exp(-0.5 * log_variance)
            right, left = (
                cdf((clean - mean + 1 / 255) * scale),
                cdf((clean - mean - 1 / 255) * scale),
            )
            p = np.where(clean < -0.999, right, np.where(clean > 0.999, 1 - left, right - left))
            return -np.log2(np.maximum(p, 1e-12)).mean()
        true = self.clean[t] * clean + self.noisy[t] * x
        ratio = np.exp(self.low[t] - log_variance)
        kl = 0.5 * (ratio - 1 - np.log(ratio) + (true - mean) ** 2 / np.exp(log_variance))
        return kl.mean() / math.log(2)


@pytest.mark.parametrize("kept", [None, lv.space_times(1_000, 250), lv.space_times(1_000, 2)])
def test_coefficients_by_beta(kept):
    steps, oracle = lv.learned_steps(levels(), kept), Oracle(kept)
    np.testing.assert_array_equal(steps.time[::-1], oracle.kept)
    for ours, expected in (
        (steps.low, oracle.low), (steps.high, oracle.high), (steps.step.clean, oracle.clean),
        (steps.step.noisy, oracle.noisy), (steps.step.inverse, 1 / np.sqrt(oracle.bar)),
        (steps.step.ratio, np.sqrt(1 / oracle.bar - 1)), (steps.step.level, np.sqrt(oracle.bar)),
    ):  # fmt: skip
        np.testing.assert_allclose(ours[::-1], expected, rtol=EXACT, atol=1e-14)
    assert (steps.low <= steps.high + EXACT).all()


def test_times_of_shorter_samplers():
    """Every stride as the release walks it: one fraction after another is added and rounded."""
    for count in (2, 3, 10, 50, 163, 250, 256, 500, 999, 1_000):
        place, expected = 0.0, []
        for _ in range(count):
            expected.append(round(place))
            place += 999 / (count - 1)
        np.testing.assert_array_equal(lv.space_times(1_000, count), expected)


def draw(b=4, shape=(3, 3, 2), seed=0):
    rng = np.random.default_rng(seed)
    clean = np.clip(rng.normal(0, 0.8, (b, *shape)), -1, 1)
    return clean, *rng.standard_normal((3, b, *shape)) * np.array([1, 1, 0.7]).reshape(
        3, 1, 1, 1, 1
    )


def test_losses_of_all_kinds_of_times():
    oracle, index = Oracle(), np.array([0, 1, 400, 999])
    clean, added, error, share = draw()
    noise = added + 0.1 * error
    level = np.sqrt(oracle.bar[index])[:, None, None, None]
    x = level * clean + np.sqrt(1 - level**2) * added
    arrays = [jnp.asarray(v, jnp.float32) for v in (clean, x, added, noise, share)]

    def run(clean, x, added, noise, share, index):
        at = lv.at_time(lv.learned_steps(levels()), index, clean.ndim)
        return lv.losses(clean, x, added, noise, share, at)

    squares, bound = jax.jit(run)(*arrays, index)
    np.testing.assert_allclose(squares, ((added - noise) ** 2).mean((1, 2, 3)), rtol=SUMS)
    rows = zip(clean, x, noise, share, index, strict=True)
    expected = [oracle.bound(*row) for row in rows]
    assert np.isfinite(expected).all() and min(expected) > 0
    # At time 0 the clean picture is x minus little, and intervals are narrow: digits are lost.
    np.testing.assert_allclose(bound, expected, rtol=2e-3)
    np.testing.assert_allclose(bound[1:], expected[1:], rtol=2e-4)
    # The bound teaches the shares alone; the squares teach the noise alone.
    total = lambda *x: sum(part.sum() for part in run(*x, index))
    of_noise, of_share = jax.grad(total, argnums=(3, 4))(*arrays)
    np.testing.assert_allclose(of_noise, 2 * (noise - added) / 18, atol=SUMS)
    for row, t in enumerate(index):
        step = 1e-5 * np.eye(18).reshape(18, 3, 3, 2)
        at = lambda share: oracle.bound(clean[row], x[row], noise[row], share, t)
        slope = [(at(share[row] + h) - at(share[row] - h)) / 2e-5 for h in step]
        ours = np.ravel(of_share[row])
        np.testing.assert_allclose(ours, slope, rtol=1e-2, atol=1e-3 * np.abs(slope).max() + 1e-9)


def test_perfect_answers_cost_nothing():
    """With the true noise and the posterior's variance the divergence is zero."""
    clean, added, _, _ = draw()
    index = np.array([1, 50, 500, 999])
    at = lv.at_time(lv.learned_steps(levels()), index, 4)
    x = diffusion.q_sample(jnp.float32(clean), jnp.float32(added), at.step.level[:, 0, 0, 0])
    _, bound = lv.losses(jnp.float32(clean), x, added, jnp.float32(added), -jnp.ones_like(x), at)
    np.testing.assert_allclose(bound, 0, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
def test_sampling_against_a_loop(clip):
    times = lv.space_times(1_000, 12)
    oracle, keys = Oracle(times), jax.random.split(jax.random.key(3), 2)
    noise = lambda xp, x, t: xp.sin(2 * x) + t.reshape(-1, 1) / 2_000
    share = lambda xp, x: xp.cos(x)
    predict = lambda x, t: (noise(jnp, x, t), share(jnp, x))
    run = lambda keys: lv.sample(predict, keys, (3,), levels(), times, clip=clip)
    one = lambda key, i: jax.random.normal(jax.random.fold_in(key, i), (3,))
    draws = [np.asarray(jax.vmap(one, (0, None))(keys, i), np.float64) for i in range(13)]
    x = draws[0]
    for i, t in enumerate(reversed(range(12))):
        told = np.full(2, float(times[t]))
        mean, log_variance = oracle.moments(x, noise(np, x, told), share(np, x), t, clip)
        x = mean + (t > 0) * np.exp(log_variance / 2) * draws[i + 1]
    ours = np.asarray(jax.jit(run)(keys))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, x, atol=(SUMS if clip else 2e-3) * np.abs(x).max())
    np.testing.assert_allclose(run(keys[::-1])[::-1], ours, atol=1e-3)


def test_deterministic_steps_are_those_of_ddim():
    times, keys = lv.space_times(1_000, 10), jax.random.split(jax.random.key(0), 3)
    table = lv.spaced_levels(levels(), times)
    denoise = lambda x, _: jnp.tanh(x)
    expected = diffusion.sample(denoise, keys, (4,), table, eta=0.0)
    ours = lv.sample(
        lambda x, t: (denoise(x, t), x), keys, (4,), levels(), times, eta=0.0, clip=True
    )
    np.testing.assert_allclose(ours, expected, atol=SUMS)


def test_best_answers_sample_the_distribution():
    """Of N(m, s^2) the best noise is linear; the posterior's exact variance gives the moments."""
    mean, deviation, count = 0.3, 0.4, 2_000
    table = jnp.asarray(levels(), jnp.float32)

    def predict(x, time):
        a = table[time.astype(int) + 1][:, None]
        lost = 1 - a * a
        spread = a**2 * deviation**2 + lost
        return jnp.sqrt(lost) * (x - a * mean) / spread, jnp.ones_like(x)

    keys = jax.random.split(jax.random.key(0), count)
    out = np.asarray(jax.jit(lambda k: lv.sample(predict, k, (1,), levels()))(keys))
    assert abs(out.mean() - mean) < 5 * deviation / math.sqrt(count)
    assert abs(out.std() - deviation) < 5 * deviation / math.sqrt(2 * count) + 0.01


def test_guidance_moves_the_first_channels_only():
    rng = np.random.default_rng(0)
    with_class, without = rng.standard_normal((2, 2, 3, 3, 8)).astype(np.float32)
    guided = lv.guide(with_class, without, 1.5, 3)
    np.testing.assert_array_equal(guided[..., 3:], with_class[..., 3:])
    expected = 1.5 * with_class - 0.5 * without
    np.testing.assert_allclose(guided[..., :3], expected[..., :3], rtol=1e-5)
    np.testing.assert_allclose(lv.guide(with_class, without, 1.0, 8), with_class, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lv.space_times(10, 11), "steps=11: must be in 2 to 10"),
        (lambda: lv.space_times(10, 1), "steps=1"),
        (lambda: lv.learned_steps(levels(), [3, 2]), "times must grow within 0 to 999"),
        (lambda: lv.learned_steps(levels(), [0, 1_000]), "times must grow"),
        (lambda: lv.learned_steps(levels()[:2]), "at least two"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
