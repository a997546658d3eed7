# SPDX-License-Identifier: Apache-2.0
"""Completion: distances by hand, refusals, two steps through the trainer."""

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
from attnjax.tasks.completion import Completion
from attnjax.train.loop import run
from attnjax.train.optimizer import make_schedule

SIZES = dict(
    points=32, groups=(24, 16), queries=8, fold=2, width=16, num_heads=2, global_width=16,
    depth=(1, 1),
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running


@pytest.fixture(scope="module")
def bound():
    task = Completion(build("pointr", **SIZES), complete_points=40, threshold=0.5, block=16)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.standard_normal(x.shape).astype(np.float32) for name, x in task.example(3).items()
    }
    draw = lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    return task, jax.tree.map(draw, abstract_params(task.model)), batch


def nearest(first, second):
    return np.linalg.norm(first[:, :, None] - second[:, None], axis=-1).min(axis=2)


def test_distances_are_those_of_the_answers(bound):
    task, params, batch = bound
    valid = np.array([True, False, True])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, batch):
        loss = task.loss(params, batch, jax.random.key(1), 0)
        return loss, task.evaluate(params, batch), task.predict(params, batch)

    (loss, metrics), found, answers = both(params, {**batch, "valid": valid})
    distances = [
        (nearest(cloud, batch["complete"]), nearest(batch["complete"], cloud))
        for cloud in (answers["coarse"], answers["prediction"])
    ]
    means = [(there.mean() + back.mean()) / 2 for there, back in distances]
    np.testing.assert_allclose(loss, sum(means), rtol=1e-5)
    np.testing.assert_allclose([metrics["coarse"], metrics["fine"]], 1000 * np.array(means), 1e-5)
    there, back = (x[valid] for x in distances[1])
    precision, recall = (there < 0.5).mean(axis=1), (back < 0.5).mean(axis=1)
    expected = {
        "cd_l1": 1000 * (there.mean() + back.mean()) / 2,
        "cd_l2": 1000 * ((there**2).mean() + (back**2).mean()),
        "f_score": np.mean(2 * precision * recall / (precision + recall)),
    }
    found = compute(found)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_bad_batches_are_refused(bound):
    task, _, batch = bound
    task.check(batch)
    with pytest.raises(RecipeError, match="the data has no complete"):
        task.check({"partial": batch["partial"]})
    with pytest.raises(RecipeError, match=r"complete has shape \(3, 39, 3\), the model and task"):
        task.check({**batch, "complete": batch["complete"][:, 1:]})
    broken = batch["partial"].copy()
    broken[2, 5, 0] = np.inf
    with pytest.raises(RecipeError, match="partial of row 2 is not finite"):
        task.check({**batch, "partial": broken})
    with pytest.raises(RecipeError, match="SequenceMixer reads values, not partial clouds"):
        Completion(build("sequence_mixer"))
    with pytest.raises(RecipeError, match=r"task.threshold=0.0 is out of range"):
        Completion(task.model, threshold=0.0)


@pytest.mark.parametrize("variant", ["cab", "pcn"])
def test_recipe_of_pcn_is_the_published_one(variant):
    loaded = recipe.load(f"configs/cab/pointr_pcn.py:{variant}").validate()
    epoch = 28_974 // 48
    assert (loaded.steps, loaded.batch) == (300 * epoch, 48)
    assert (loaded.optim.lr, loaded.optim.weight_decay) == (5e-4, 5e-4)
    schedule = make_schedule(loaded.optim, loaded.steps)
    for number, factor in {0: 1, 21: 0.9, 42: 0.81, 299: 0.9 ** (299 / 21), 2000: 0.02}.items():
        np.testing.assert_allclose(schedule(number * epoch), 5e-4 * factor, rtol=1e-4)
    model = build("pointr", loaded.model["preset"])
    assert (model.points, model.completed) == (2_048, 16_384)


@pytest.mark.slow
def test_two_steps_of_the_shipped_recipe(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(
        "attnjax.train.loop.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1])
    )
    shipped = recipe.load("configs/cab/shapes.py")
    shipped.steps, shipped.batch, shipped.optim.warmup = 2, 4, 0
    shipped.model |= SIZES
    shipped.task |= {"complete_points": 40, "block": 64}
    shipped.data.source |= {"points": 32, "complete_points": 40}
    shipped.evals["test"].data.source |= {"points": 32, "complete_points": 40, "size": 6}
    shipped.evals["test"].batch = 4
    shipped.report = dataclasses.replace(shipped.report, tensorboard=False, every=1, samples=0)
    result = run(shipped.validate(), tmp_path)
    assert result.step == 2
    assert set(result.metrics) == {"test/cd_l1", "test/cd_l2", "test/f_score"}
    assert all(np.isfinite(value) for value in result.metrics.values())
