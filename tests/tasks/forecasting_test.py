# SPDX-License-Identifier: Apache-2.0
"""Forecasting: errors by hand, units of the data, refusals, two steps through the trainer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from attnjax import recipe
from attnjax.errors import RecipeError
from attnjax.metrics import compute
from attnjax.models.load import abstract_params, build
from attnjax.parallel import make_mesh
from attnjax.tasks.forecasting import Forecasting
from attnjax.train.loop import run
from attnjax.train.optimizer import make_schedule

SIZES = dict(
    lengths=(8, 4, 4), channels=2, width=16, num_heads=2, hidden=16, depth=(1, 1), dropout=0.0
)
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running


@pytest.fixture(scope="module")
def bound():
    task = Forecasting(build("informer", **SIZES), denormalised=True)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.standard_normal(x.shape).astype(np.float32) for name, x in task.example(3).items()
    }
    draw = lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return task, jax.tree.map(draw, abstract_params(task.model)), batch


def test_errors_are_those_of_the_forecast(bound):
    task, params, batch = bound
    batch = {**batch, "valid": np.array([True, False, True])}
    plain = Forecasting(task.model)
    assert plain.inputs == ("past", "past_time", "future_time", "future")

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, batch):
        loss = task.loss(params, batch, jax.random.key(1), 0)
        found = task.evaluate(params, batch), plain.evaluate(params, batch)
        return loss, found, task.predict(params, batch), plain.predict(params, batch)

    (loss, metrics), (found, few), in_units, standard = both(params, batch)
    forecast = np.asarray(standard["prediction"])
    assert set(few) == {"mse", "mae"}
    error = forecast - batch["future"]
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["mae"], np.mean(np.abs(error)), rtol=1e-5)
    error, scale = error[[0, 2]], batch["scale"][[0, 2], None]
    expected = {
        "mse": np.mean(error**2), "mae": np.mean(np.abs(error)),
        "unit_mse": np.mean((error * scale) ** 2), "unit_mae": np.mean(np.abs(error * scale)),
    }  # fmt: skip
    found = compute(found)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        in_units["prediction"], forecast * batch["scale"][:, None] + batch["mean"][:, None],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_bad_batches_are_refused(bound):
    task, _, batch = bound
    task.check(batch)
    missing = {name: x for name, x in batch.items() if name != "scale"}
    with pytest.raises(RecipeError, match="the data has no scale"):
        task.check(missing)
    with pytest.raises(RecipeError, match=r"past has shape \(3, 7, 2\), the model and task read"):
        task.check({**batch, "past": batch["past"][:, 1:]})
    broken = batch["future"].copy()
    broken[1, 2, 0] = np.nan
    with pytest.raises(RecipeError, match="future of row 1 is not finite"):
        task.check({**batch, "future": broken})
    with pytest.raises(RecipeError, match="SequenceMixer is no forecaster: it has no horizon"):
        Forecasting(build("sequence_mixer"))


def test_learning_rate_is_halved_as_in_the_release():
    """After the second epoch for the first time: 1, 1, 1/2, 1/4, 1/8, 1/16."""
    loaded = recipe.load("configs/cab/informer_ett.py:etth1_m").validate()
    epoch = (8_640 - 336 - 720 + 1) // 32
    assert (loaded.steps, loaded.batch) == (6 * epoch, 32)
    schedule = make_schedule(loaded.optim, loaded.steps)
    rates = [
        float(schedule(number * epoch + step)) for number in range(6) for step in (0, epoch - 1)
    ]
    expected = np.repeat([1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], 2) * 1e-4
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_two_steps_of_the_shipped_recipe(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(
        "attnjax.train.loop.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1])
    )
    shipped = recipe.load("configs/cab/seasonal_series.py")
    shipped.steps, shipped.batch, shipped.optim.warmup = 2, 8, 0
    shipped.model |= SIZES
    sizes = {"length": 8, "horizon": 4, "rows": 100}
    shipped.data.source |= sizes
    shipped.evals = {"test": shipped.evals["test"]}
    shipped.evals["test"].data.source |= sizes
    shipped.report = dataclasses.replace(shipped.report, tensorboard=False, every=1, samples=0)
    result = run(shipped.validate(), tmp_path)
    assert result.step == 2 and set(result.metrics) == {"test/mse", "test/mae"}
    assert all(np.isfinite(value) for value in result.metrics.values())
