# SPDX-License-Identifier: Apache-2.0
"""Answers at every position: losses by hand, what counts, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.metrics.state import compute
from attnjax.models import build
from attnjax.tasks import NextToken, PositionRegression, Task

SIZE = {"length": 6, "dim": 8, "depth": 1, "num_heads": 2, "pool": "none"}
REGRESSION = {**SIZE, "num_classes": 1, "mixer": "fnet"}
LANGUAGE = {**SIZE, "vocab": 5, "num_classes": 5, "mixer": "convolution",
            "mixer_options": {"causal": True}}  # fmt: skip


def regression():
    task = PositionRegression(build("sequence_mixer", **REGRESSION))
    rng = np.random.default_rng(0)
    batch = {
        "values": rng.standard_normal((4, 6, 1)).astype(np.float32),
        "target": rng.standard_normal((4, 6, 1)).astype(np.float32),
        "scored": rng.random((4, 6)) < 0.7,
    }
    return task, batch, drawn(task)


def language():
    task = NextToken(build("sequence_mixer", **LANGUAGE))
    batch = {"tokens": np.random.default_rng(0).integers(1, 5, (4, 6)).astype(np.int32)}
    batch["tokens"][0, 4:] = 0
    return task, batch, drawn(task)


def drawn(task):
    """Parameters of every shape by formula: compiling an initialisation takes longer."""
    shapes = jax.eval_shape(task.init, jax.random.key(0), task.example(1))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("make", [regression, language])
def test_contract(make):
    task, batch, params = make()
    assert isinstance(task, Task)
    assert set(task.example(4)) == set(task.inputs) == set(batch)
    for name, x in task.example(4).items():
        assert (x.shape, x.dtype) == (batch[name].shape, batch[name].dtype)
    task.check(batch)
    assert task.flops == 3 * task.model.flops() > 0
    assert set(task.explain(params, batch)) == {"prediction", "maps"}


def test_squared_error_counts_scored_positions_of_valid_rows():
    task, batch, params = regression()
    answers = np.asarray(task.predict(params, batch)["prediction"])
    errors = np.square(answers - batch["target"])[..., 0]
    loss, shown = task.loss(params, batch, jax.random.key(1), 0)
    assert float(loss) == pytest.approx(errors[batch["scored"]].mean(), rel=1e-5)
    assert float(shown["squared_error"]) == float(loss)
    valid = np.array([True, False, True, True])
    batch["target"][1] = np.nan
    found = compute(task.evaluate(params, {**batch, "valid": valid}))
    kept = batch["scored"] & valid[:, None]
    assert found["squared_error"] == pytest.approx(errors[kept].mean(), rel=1e-5)
    assert found["variance"] == pytest.approx(np.square(batch["target"])[kept].mean(), rel=1e-5)


def test_bits_are_those_of_the_next_token_without_padding():
    task, batch, params = language()
    logits = task.predict(params, batch)["logits"]
    surprise = -jax.nn.log_softmax(logits[:, :-1])
    after = batch["tokens"][:, 1:]
    nats = np.take_along_axis(np.asarray(surprise), after[..., None], axis=-1)[..., 0]
    loss, shown = task.loss(params, batch, jax.random.key(1), 0)
    assert float(loss) == pytest.approx(nats[after > 0].mean(), rel=1e-5)
    assert float(shown["bits"]) == pytest.approx(float(loss) / np.log(2), rel=1e-5)
    valid = jnp.array([True, False, True, True])
    found = compute(task.evaluate(params, {**batch, "valid": valid}))
    kept = (after > 0) & np.asarray(valid)[:, None]
    assert found["bits"] == pytest.approx(nats[kept].mean() / np.log(2), rel=1e-5)
    hits = np.asarray(logits[:, :-1]).argmax(axis=-1) == after
    assert found["accuracy"] == pytest.approx(hits[kept].mean())


def test_bad_batches_are_refused():
    task, batch, _ = regression()
    with pytest.raises(RecipeError, match="the data has no scored"):
        task.check({k: v for k, v in batch.items() if k != "scored"})
    with pytest.raises(RecipeError, match=r"target has shape \(4, 6, 2\)"):
        task.check({**batch, "target": np.zeros((4, 6, 2))})
    with pytest.raises(RecipeError, match="nothing counts"):
        task.check({**batch, "scored": np.zeros((4, 6), bool)})
    task, batch, _ = language()
    batch["tokens"][2, 3] = 9
    with pytest.raises(RecipeError, match="token 9 at position 3 of row 2"):
        task.check(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": "fnet", "mixer_options": {}}, "'fnet' sees the future"),
        ({"num_classes": 4}, "num_classes=4 must equal vocab=5"),
        ({"pool": "mean"}, "pool='mean'"),
    ],
)
def test_models_that_cannot_predict_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        NextToken(build("sequence_mixer", **{**LANGUAGE, **change}))
