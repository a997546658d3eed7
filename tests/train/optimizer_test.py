# SPDX-License-Identifier: Apache-2.0
"""Schedules at their hand-computed corners; which parameters decay."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnjax.errors import RecipeError
from attnjax.recipe import Optim, Recipe
from attnjax.train.optimizer import decayed, make_optimizer, make_schedule

CLOSE = 1e-6  # float32 schedules


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", {0: 0.1, 5: 0.55, 10: 1.0, 50: 0.55, 90: 0.1, 99: 0.1}),
        ("linear", {0: 0.1, 10: 1.0, 50: 0.55, 90: 0.1, 99: 0.1}),
        ("inverse_sqrt", {0: 0.1, 5: 0.55, 10: 1.0, 40: 0.5, 90: 1 / 3}),
        ("constant", {0: 0.1, 10: 1.0, 50: 1.0, 99: 1.0}),
    ],
)
def test_schedule(decay, expected):
    optim = Optim(lr=1.0, warmup=10, warmup_lr=0.1, decay=decay, end_lr=0.1, cooldown=10)
    schedule = make_schedule(optim, 100)
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, abs=CLOSE)


def test_runs_may_end_before_the_decay_does():
    """0.4 cycles of a cosine, as the landmark paper's LLaMA: cos(0.8 pi) at the end."""
    schedule = make_schedule(Optim(lr=1.0, warmup=20, cooldown=-45), 200)
    halfway = (1 + np.cos(0.4 * np.pi)) / 2
    for step, value in ((20, 1.0), (110, halfway), (200, (1 + np.cos(0.8 * np.pi)) / 2)):
        assert float(schedule(step)) == pytest.approx(value, abs=CLOSE)


def test_learning_rate_falls_in_steps():
    optim = Optim(
        lr=1.0, warmup=10, warmup_lr=1.0, decay="step", decay_every=20, decay_rate=0.5, end_lr=0.2
    )
    schedule = make_schedule(optim, 100)
    for step, value in {0: 1.0, 29: 1.0, 30: 0.5, 49: 0.5, 50: 0.25, 70: 0.2, 99: 0.2}.items():
        assert float(schedule(step)) == pytest.approx(value, abs=CLOSE)
    for wrong, message in (
        ({"decay_every": 0}, r"optim.decay_every=0: must be at least 1 for the decay 'step'"),
        ({"decay_rate": 0.0}, r"optim.decay_rate=0.0: must be in \(0, 1\]"),
        ({"cooldown": 5}, r"optim.cooldown=5"),
    ):
        recipe = Recipe(optim=dataclasses.replace(optim, **wrong))
        with pytest.raises(RecipeError, match=message):
            recipe.validate()


def test_vectors_and_named_tables_do_not_decay():
    params = {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "position_embedding": jnp.ones((1, 3, 2)),
    }
    chosen = decayed(Optim(no_decay=(r"position_embedding",)), params)
    assert chosen == {"dense": {"kernel": True, "bias": False}, "position_embedding": False}
    assert decayed(Optim(decay_vectors=True), params)["dense"]["bias"] is True


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_every_rule_decreases_a_quadratic(name):
    optimizer = make_optimizer(Optim(name=name, lr=0.05, decay="constant", clip=1.0), 50)
    params = {"w": jnp.full((4, 4), 2.0)}
    state = optimizer.init(params)
    for _ in range(50):
        updates, state = optimizer.update({"w": 2 * params["w"]}, state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.mean(params["w"] ** 2)) < 2.0


def test_decay_is_decoupled():
    """With zero gradients AdamW shrinks weights by 1 - lr * decay and leaves biases alone."""
    optim = Optim(lr=0.1, weight_decay=0.5, decay="constant")
    optimizer = make_optimizer(optim, 10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zero = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["kernel"], 0.95, atol=CLOSE)
    np.testing.assert_array_equal(after["bias"], 1.0)
