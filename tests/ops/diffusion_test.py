# SPDX-License-Identifier: Apache-2.0
"""Diffusion against its closed forms in float64, and against the published code of SR3."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import diffusion

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/pictures.npz"

EXACT = 1e-12  # float64, relative
FLOAT32 = 2e-6  # the published buffers are float32, relative
SUMS = 1e-5  # twenty steps in float32, absolute, values of size 1


@functools.cache
def levels(steps=2_000, name="linear"):
    return diffusion.signal_levels(diffusion.betas(name, steps))


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_schedules_and_steps_are_the_published_ones(name):
    golden = np.load(GOLDENS, allow_pickle=False)
    times = np.array([0, 1, 2, 500, 1000, 1998, 1999])
    ours = levels(name=name)
    assert ours.dtype == np.float64 and ours.shape == (2_001,)
    expected = golden[f"{name}/levels"]
    np.testing.assert_allclose(ours[[*times, 2_000]], expected, rtol=1e-10)
    steps = diffusion.reverse_steps(ours)
    back = 1_999 - times  # Steps are in the order of sampling.
    np.testing.assert_allclose(steps.level, ours[:0:-1], rtol=EXACT)
    for field in ("clean", "noisy", "inverse", "ratio"):
        np.testing.assert_allclose(
            getattr(steps, field)[back], golden[f"{name}/{field}"], rtol=FLOAT32, atol=1e-9,
            err_msg=field,
        )  # fmt: skip
    np.testing.assert_allclose(
        steps.deviation[back] ** 2, golden[f"{name}/variance"], rtol=FLOAT32, atol=1e-12
    )


def test_levels_by_hand():
    betas = diffusion.betas("linear", 3, first=0.1, last=0.3)
    np.testing.assert_allclose(betas, [0.1, 0.2, 0.3], rtol=EXACT)
    expected = [1, math.sqrt(0.9), math.sqrt(0.72), math.sqrt(0.504)]
    np.testing.assert_allclose(diffusion.signal_levels(betas), expected, rtol=EXACT)
    assert diffusion.betas("cosine", 10).max() == 0.999


def test_strided_schedules_keep_both_ends():
    full = levels()
    for steps in (1, 7, 100):
        short = diffusion.stride_levels(full, steps)
        assert len(short) == steps + 1 and short[0] == 1 and short[-1] == full[-1]
        assert np.isin(short, full).all() and (np.diff(short) < 0).all()
    np.testing.assert_array_equal(diffusion.stride_levels(full, 2_000), full)


@pytest.mark.parametrize("steps", [2_000, 50])
def test_reverse_steps_are_the_posterior(steps):
    """Mean and variance of q(x_s | x_t, x_0) by Bayes' rule; and the marginal, for every eta."""
    table = diffusion.stride_levels(levels(), steps)
    now, after = table[:0:-1], table[-2::-1]
    keep = now / after  # of x_s in x_t
    precision = keep[:-1] ** 2 / (1 - keep[:-1] ** 2) + 1 / (1 - after[:-1] ** 2)
    mine = diffusion.reverse_steps(table)
    np.testing.assert_allclose(mine.deviation[:-1] ** 2, 1 / precision, rtol=1e-8)
    np.testing.assert_allclose(
        mine.noisy[:-1], keep[:-1] / (1 - keep[:-1] ** 2) / precision, rtol=1e-8
    )
    np.testing.assert_allclose(
        mine.clean[:-1], after[:-1] / (1 - after[:-1] ** 2) / precision, rtol=1e-8
    )
    assert (mine.deviation[-1], mine.noisy[-1], mine.clean[-1]) == (0, 0, 1)
    for eta in (0.0, 0.4, 1.0):
        step = diffusion.reverse_steps(table, eta)
        np.testing.assert_allclose(step.clean + step.noisy * now, after, rtol=1e-12)
        spread = step.noisy**2 * (1 - now**2) + step.deviation**2
        np.testing.assert_allclose(spread, 1 - after**2, rtol=1e-9, atol=1e-15)


def test_adding_noise():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 3, 4, 5))
    level = np.array([1.0, 0.6, 1e-3])
    expected = level[:, None, None] * clean + np.sqrt(1 - level**2)[:, None, None] * noise
    ours = diffusion.q_sample(*(jnp.asarray(x, jnp.float32) for x in (clean, noise, level)))
    np.testing.assert_allclose(ours, expected, atol=SUMS)
    with pytest.raises(ValueError, match=r"level \(2,\) must be"):
        diffusion.q_sample(clean, noise, level[:2])


def test_continuous_levels_fill_the_schedule():
    """Uniform over steps, uniform inside a step: the mean and the share of every step say so."""
    table = diffusion.signal_levels(diffusion.betas("linear", 4, first=0.1, last=0.4))
    draw = jax.jit(lambda key: diffusion.sample_levels(key, table, 4_000))
    drawn = np.asarray(draw(jax.random.key(0)))
    assert drawn.dtype == np.float32 and len(np.unique(drawn)) > 3_900
    assert table[-1] <= drawn.min() and drawn.max() <= 1
    counts, _ = np.histogram(drawn, bins=table[::-1])
    assert np.abs(counts - 1_000).max() < 4 * math.sqrt(750)
    middle = (table[1:] + table[:-1]) / 2
    widest = np.abs(np.diff(table)).max()
    assert abs(drawn.mean() - middle.mean()) < 4 * widest / math.sqrt(4_000)


def draws(keys, index, shape):
    """The noise that the sampler uses at one step."""
    one = lambda key: jax.random.normal(jax.random.fold_in(key, index), shape)
    return np.asarray(jax.vmap(one)(keys), np.float64)


@pytest.mark.parametrize(("eta", "clip"), [(1.0, True), (0.5, False)])
def test_sampling_against_a_loop(eta, clip):
    table = diffusion.stride_levels(levels(), 20)
    keys = jax.random.split(jax.random.key(1), 2)
    denoise = lambda xp, x, level: xp.sin(3 * x) + level.reshape(-1, 1) * x
    run = jax.jit(
        lambda keys: diffusion.sample(
            lambda x, level: denoise(jnp, x, level), keys, (3,), table, eta=eta, clip=clip
        )
    )
    x = draws(keys, 0, (3,))
    for i in range(20):
        now, after = table[20 - i], table[19 - i]
        noise = denoise(np, x, np.full(2, now))
        clean = (x - math.sqrt(1 - now**2) * noise) / now
        clean = np.clip(clean, -1, 1) if clip else clean
        # DDIM's form: the noise that the (clipped) clean picture leaves, and fresh noise.
        noise = (x - now * clean) / math.sqrt(1 - now**2)
        spread = eta**2 * (1 - after**2) / (1 - now**2) * (1 - now**2 / after**2)
        x = after * clean + math.sqrt(max(1 - after**2 - spread, 0)) * noise
        x = x + math.sqrt(spread) * draws(keys, i + 1, (3,))
    ours = np.asarray(run(keys))
    assert ours.dtype == np.float32
    # Without clipping the first steps divide by 0.007, and rounding is as much larger.
    np.testing.assert_allclose(ours, x, atol=SUMS if clip else 1e-3 * np.abs(x).max())
    np.testing.assert_allclose(run(keys[::-1])[::-1], ours, atol=SUMS)


def test_best_denoiser_samples_the_distribution():
    """Of N(m, s^2) the best prediction is linear, so the samples' moments are a recursion."""
    mean, deviation = 0.4, 0.2

    def denoise(x, level):
        a = level[:, None]
        lost = (1 - a) * (1 + a)
        return jnp.sqrt(lost) * (x - a * mean) / (a**2 * deviation**2 + lost)

    def moments(table, eta):
        m, variance = 0.0, 1.0
        for now, _, _, clean, noisy, fresh in zip(
            *diffusion.reverse_steps(table, eta), strict=True
        ):
            # The clean picture that is expected of x is m + gain (x - a m).
            gain = now * deviation**2 / (now**2 * deviation**2 + 1 - now**2)
            m = clean * (mean + gain * (m - now * mean)) + noisy * m
            variance = (clean * gain + noisy) ** 2 * variance + fresh**2
        return m, math.sqrt(variance)

    for eta in (1.0, 0.0):
        np.testing.assert_allclose(moments(levels(), eta), (mean, deviation), atol=0.005)
    count, table = 4_000, diffusion.stride_levels(levels(), 50)
    keys = jax.random.split(jax.random.key(0), count)
    for eta in (1.0, 0.0):
        run = jax.jit(lambda k: diffusion.sample(denoise, k, (1,), table, eta=eta, clip=False))
        out, (m, spread) = np.asarray(run(keys)), moments(table, eta)
        assert abs(out.mean() - m) < 4 * spread / math.sqrt(count)
        assert abs(out.std() - spread) < 4 * spread / math.sqrt(2 * count)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion.betas("quadratic", 3), "unknown schedule 'quadratic': choose from lin"),
        (lambda: diffusion.betas("linear", 0), "steps=0"),
        (lambda: diffusion.betas("linear", 3, last=1.0), "last=1.0"),
        (lambda: diffusion.betas("cosine", 3, offset=-1), "offset=-1"),
        (lambda: diffusion.stride_levels(levels(), 2_001), "steps=2001: must be in 1 to 2000"),
        (lambda: diffusion.reverse_steps(levels(), 1.5), "eta=1.5"),
        (lambda: diffusion.reverse_steps(levels()[::-1]), "falls from 1"),
        (lambda: diffusion.reverse_steps(np.array([1.0, 0.0])), "nothing of the signal"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
