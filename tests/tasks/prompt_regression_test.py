# SPDX-License-Identifier: Apache-2.0
"""Loss and metrics of regression in context."""

import jax
import numpy as np
import pytest

from attnjax import recipe as recipe_lib
from attnjax.errors import RecipeError
from attnjax.metrics.state import compute, merge
from attnjax.models.gpt2 import GPT2
from attnjax.models.regression_attention import RegressionAttention
from attnjax.tasks.prompt_regression import PromptRegression
from attnjax.train.loop import run

RTOL = 1e-5


def made():
    task = PromptRegression(RegressionAttention(prompts=3, length=4, replicas=3))
    rng = np.random.default_rng(0)
    batch = {
        name: rng.standard_normal(x.shape).astype(np.float32) for name, x in task.example(2).items()
    }
    return task, task.init(jax.random.key(0), batch), batch


def test_loss_and_metrics_are_those_of_the_predictions():
    task, params, batch = made()
    guess = np.asarray(task.predict(params, batch)["prediction"])
    errors = np.square(guess - batch["target"][:, :, None]).mean(axis=-1)
    loss, metrics = task.loss(params, batch, jax.random.key(0), 0)
    np.testing.assert_allclose(loss, errors.mean(axis=(0, 1)).sum(), rtol=RTOL)
    np.testing.assert_allclose(metrics["mse"], errors.mean(), rtol=RTOL)
    assert {
        f"{name}_{r}_{h}" for name in ("omega", "mu") for r in range(3) for h in range(2)
    } < set(metrics)
    valid = np.array([True, False])
    half = {name: np.concatenate([x[1:], np.full_like(x[:1], np.nan)]) for name, x in batch.items()}
    first = task.evaluate(params, {name: x[:1] for name, x in batch.items()})
    values = compute(merge(first, task.evaluate(params, half | {"valid": valid})))
    np.testing.assert_allclose(values["mse"], errors.mean(), rtol=RTOL)
    np.testing.assert_allclose(values["median_mse"], np.median(errors.mean(axis=(0, 1))), rtol=RTOL)
    for name in ("diagonal_ratio", "answer_ratio", "imbalance", "opposite"):
        assert 0 <= values[name] <= 1


def test_wrong_models_and_batches_are_refused():
    with pytest.raises(RecipeError, match="GPT2 has no dim"):
        PromptRegression(GPT2())
    task, _, batch = made()
    task.check(batch)
    with pytest.raises(RecipeError, match=r"examples has shape .* reads"):
        task.check(batch | {"examples": batch["examples"][..., :5]})
    with pytest.raises(RecipeError, match="the data has no target"):
        task.check({name: x for name, x in batch.items() if name != "target"})


@pytest.mark.slow
def test_two_heads_learn_opposite_signs(tmp_path):
    """The quick protocol; 5 networks of each kind, all errors at 40 examples."""
    results = {}
    for variant in ("one_head", "two_heads", "four_heads"):
        recipe = recipe_lib.load(f"configs/icl_linear_regression/single_task.py:{variant}")
        # Eight groups of 32 prompts instead of four of 64, for eight devices.
        recipe.batch, recipe.model["prompts"] = 8, 32
        for data in (recipe.data, *(evaluation.data for evaluation in recipe.evals.values())):
            data.source["prompts"] = 32
        results[variant] = run(recipe, tmp_path / variant).metrics
    one, two, four = (results[name] for name in results)
    assert two["test/median_mse"] <= 0.27
    assert one["test/median_mse"] - two["test/median_mse"] >= 0.11
    assert abs(four["test/median_mse"] - two["test/median_mse"]) <= 0.02
    assert two["test/opposite"] > 0.5
    assert two["test/diagonal_ratio"] >= 0.98
    assert two["test/imbalance"] < 0.05
    assert two["short/median_mse"] > two["test/median_mse"] > two["long/median_mse"]
