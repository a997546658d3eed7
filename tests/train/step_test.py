# SPDX-License-Identifier: Apache-2.0
"""The training step on a linear problem whose gradient is known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.recipe import Guard, Optim, Recipe
from attnjax.train.step import make_init, make_step

CLOSE = 1e-6  # float32, a handful of operations


class Regression:
    """Least squares: loss = mean((x @ w - y)^2); noise makes the step use its key."""

    def __init__(self, noise=0.0):
        self.noise = noise

    def example(self, batch):
        return {
            "x": jax.ShapeDtypeStruct((batch, 3), jnp.float32),
            "y": jax.ShapeDtypeStruct((batch,), jnp.float32),
        }

    def init(self, key, batch):
        return {"w": jax.random.normal(key, (batch["x"].shape[1],))}

    def loss(self, params, batch, key, step):
        target = batch["y"] + self.noise * jax.random.normal(key, batch["y"].shape)
        error = batch["x"] @ params["w"] - target
        return jnp.mean(error**2), {"bias": jnp.mean(error)}


def make_batch(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": (x @ np.array([1.0, -2.0, 0.5])).astype(np.float32)}


def start(recipe, task=None):
    task = task or Regression()
    state = jax.jit(make_init(task, recipe))(jax.random.key(0))
    return state, jax.jit(make_step(task, recipe))


SGD = Optim(name="sgd", lr=0.1, momentum=0.0, decay="constant")


def test_one_step_is_gradient_descent():
    state, step = start(Recipe(steps=10, optim=SGD))
    batch = make_batch()
    new, metrics = step(state, batch)
    w = np.asarray(state.params["w"], np.float64)
    error = batch["x"] @ w - batch["y"]
    gradient = 2 * batch["x"].T @ error / 8
    np.testing.assert_allclose(new.params["w"], w - 0.1 * gradient, atol=CLOSE)
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(error**2)), abs=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), abs=1e-5)
    assert int(new.step) == 1
    assert float(metrics["skipped"]) == 0


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_averages_the_whole_batch(parts):
    whole, step = start(Recipe(steps=10, optim=SGD))
    _, accumulate = start(
        Recipe(steps=10, optim=dataclasses.replace(SGD, accumulate=parts)), Regression()
    )
    batch = make_batch()
    one, metrics_one = step(whole, batch)
    many, metrics_many = accumulate(whole, batch)
    np.testing.assert_allclose(many.params["w"], one.params["w"], atol=CLOSE)
    np.testing.assert_allclose(metrics_many["loss"], metrics_one["loss"], rtol=1e-6)


def test_average_of_parameters():
    recipe = Recipe(steps=10, optim=dataclasses.replace(SGD, ema=0.9))
    state, step = start(recipe)
    new, _ = step(state, make_batch())
    expected = 0.9 * state.params["w"] + 0.1 * new.params["w"]
    np.testing.assert_allclose(new.ema["w"], expected, atol=CLOSE)
    assert new.averaged is new.ema
    plain, _ = start(Recipe(steps=10, optim=SGD))
    assert plain.averaged is plain.params


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_bad_step_changes_nothing(name):
    recipe = Recipe(steps=10, optim=Optim(name=name, lr=0.1, ema=0.5))
    state, step = start(recipe)
    state, _ = step(state, make_batch())
    poisoned = make_batch()
    poisoned["x"][3, 1] = np.nan
    after, metrics = step(state, poisoned)
    assert float(metrics["skipped"]) == 1
    assert int(after.guard.bad_steps) == 1
    assert int(after.step) == int(state.step) + 1
    for kept, before in zip(
        jax.tree.leaves((after.params, after.opt_state, after.ema)),
        jax.tree.leaves((state.params, state.opt_state, state.ema)),
        strict=True,
    ):
        np.testing.assert_array_equal(kept, before)
    healed, metrics = step(after, make_batch())
    assert int(healed.guard.bad_steps) == 0
    assert float(metrics["skipped"]) == 0


def test_spike_is_skipped_only_when_enabled():
    for sigma, skipped in ((10.0, 1.0), (0.0, 0.0)):
        recipe = Recipe(steps=200, optim=SGD, guard=Guard(spike_sigma=sigma))
        state, step = start(recipe, Regression(noise=0.1))
        for i in range(60):
            state, _ = step(state, make_batch(i))
        spike = make_batch(99)
        spike["y"] = spike["y"] + 100.0
        _, metrics = step(state, spike)
        assert float(metrics["skipped"]) == skipped


def test_guard_on_a_healthy_run_changes_no_bit():
    finals = []
    for skip in (True, False):
        recipe = Recipe(steps=30, optim=Optim(lr=0.05), guard=Guard(skip=skip))
        state, step = start(recipe, Regression(noise=0.1))
        for i in range(30):
            state, _ = step(state, make_batch(i))
        finals.append(np.asarray(state.params["w"]))
    np.testing.assert_array_equal(*finals)


def test_randomness_depends_on_the_step_only():
    state, step = start(Recipe(steps=10, optim=SGD), Regression(noise=1.0))
    batch = make_batch()
    first, a = step(state, batch)
    _, again = step(state, batch)
    _, b = step(dataclasses.replace(state, step=first.step), batch)
    assert float(a["loss"]) == float(again["loss"])
    assert float(a["loss"]) != float(b["loss"])
