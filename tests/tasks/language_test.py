# SPDX-License-Identifier: Apache-2.0
"""Language modelling: what counts, what is reported, and that a source's entropy is reached."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnjax import metrics, recipe
from attnjax.data.text import MarkovText
from attnjax.errors import RecipeError
from attnjax.models.load import build
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.tasks import LanguageModelling, Task

TOLERANCE = 1e-5
KEY = jax.random.key(0)


@functools.cache
def make(**options):
    fields = {"experts": {"count": 4}} if options.pop("has_experts", False) else {}
    model = build("decoder", vocab_size=40, width=32, hidden=48, length=12, **fields)
    task = LanguageModelling(model, **options)
    return task, task.init(KEY, task.example(1))


def draw(b=2):
    rng = np.random.default_rng(0)
    tokens = rng.integers(40, size=(b, 12)).astype(np.int32)
    return {"tokens": tokens}


@functools.cache
def dense(model):
    return jax.jit(lambda p, *x: model.apply({"params": p}, *x).logits)


def by_hand(task, params, batch):
    """Loss of every token from dense logits, and which count."""
    segments = batch.get("segments")
    logits = dense(task.model)(params, batch["tokens"], segments)
    logits = np.asarray(logits, np.float64)[:, :-1]
    labels = batch["tokens"][:, 1:]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    counts = np.ones(labels.shape, bool)
    if segments is not None:
        counts = (segments[:, :-1] > 0) & (segments[:, :-1] == segments[:, 1:])
    return logits, nll, counts


def test_it_is_a_task():
    task, params = make()
    assert isinstance(task, Task)
    assert task.inputs == ("tokens",) and task.example(3)["tokens"].shape == (3, 12)
    assert task.flops == 3 * task.model.flops()
    assert params["head"]["kernel"].shape == (32, 40)


@pytest.mark.parametrize(("chunk", "packed"), [(0, False), (5, True)])
def test_loss_is_the_mean_over_the_tokens_that_count(chunk, packed):
    task, params = make(z_loss=0.1, logits_chunk=chunk, packed=packed)
    batch = draw()
    if packed:
        batch["segments"] = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0, 0] + [3] * 10], np.int32)
    loss, values = jax.jit(task.loss)(params, batch, KEY, 0)
    logits, nll, counts = by_hand(task, params, batch)
    assert counts.sum() == (4 + 3 + 9 if packed else 22)
    lse = np.log(np.exp(logits).sum(-1))
    mean = nll[counts].mean()
    np.testing.assert_allclose(loss, mean + 0.1 * (lse[counts] ** 2).mean(), rtol=TOLERANCE)
    hits = (logits.argmax(-1) == batch["tokens"][:, 1:])[counts].mean()
    expected = {"accuracy": hits, "perplexity": np.exp(mean), "bits_per_byte": mean / math.log(2)}
    assert set(values) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=TOLERANCE, err_msg=name)


def test_evaluation_counts_valid_examples_only():
    task, params = make(bytes_per_token=2.5, tokens_per_word=1.5)
    batch = draw(3) | {"valid": np.array([True, False, True])}
    values = metrics.compute(jax.jit(task.evaluate)(params, batch))
    _, nll, _ = by_hand(task, params, batch)
    mean = nll[[0, 2]].mean()
    assert values["loss"] == pytest.approx(mean, rel=TOLERANCE)
    assert values["perplexity"] == pytest.approx(math.exp(mean), rel=TOLERANCE)
    assert values["bits_per_byte"] == pytest.approx(mean / math.log(2) / 2.5, rel=TOLERANCE)
    assert values["word_perplexity"] == pytest.approx(math.exp(1.5 * mean), rel=TOLERANCE)
    found = jax.jit(task.predict)(params, batch)
    np.testing.assert_allclose(
        found["log_likelihood"], np.where(batch["valid"], -nll.sum(1), 0), rtol=TOLERANCE
    )
    assert found["prediction"].shape == (3, 12)
    shown = jax.jit(task.explain)(params, batch)
    assert shown["prediction"].shape == (3,)
    assert all(byx.shape == (3, 1, 12) for byx in shown["maps"].values())


def test_dropout_follows_the_key():
    model = build("gpt2", vocab_size=40, width=16, num_heads=2, hidden=16, depth=1, length=12)
    task = LanguageModelling(model)
    params, loss = task.init(KEY, {}), jax.jit(task.loss)
    values = [loss(params, draw(), jax.random.key(seed), 0)[0] for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_experts_add_their_penalty_and_are_reported():
    task, params = make(has_experts=True)
    loss, values = jax.jit(task.loss)(params, draw(), KEY, 0)
    aux = jax.jit(lambda p, x: task.model.apply({"params": p}, x).aux)(params, draw()["tokens"])
    np.testing.assert_allclose(loss - np.log(values["perplexity"]), aux["penalty"], rtol=1e-3)
    assert {"load_loss", "z_loss", "dropped"} < set(values)


def test_devices_change_nothing():
    """Chunks take their tokens from the whole length, which is divided here."""
    task, params = make(logits_chunk=6, z_loss=0.01)
    step = jax.jit(
        jax.value_and_grad(lambda p, x: task.loss(p, x, KEY, 0)[0]),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    loss, gradients = step(params, draw())
    mesh = make_mesh({"data": 2, "model": 2, "context": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(params, mesh)[0])
        again, found = step(placed, jax.device_put(draw(), batch_sharding(mesh)))
    np.testing.assert_allclose(again, loss, rtol=TOLERANCE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), found, gradients
    )


def test_training_reaches_the_entropy_of_the_source():
    """A chain of order 1: from ln 40 to within 5 % of what the best predictor loses."""
    source = MarkovText(length=32, symbols=6, size=4096)
    model = build("decoder", vocab_size=128, length=32, width=16, depth=1, hidden=32)
    task = LanguageModelling(model)
    params = task.init(KEY, {})
    optimizer = optax.adam(2e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        (loss, _), gradient = jax.value_and_grad(task.loss, has_aux=True)(params, batch, KEY, 0)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    rows = np.stack([source[i]["tokens"] for i in range(64 * 32)]).reshape(64, 32, 32)
    for tokens in rows:
        params, state, _ = step(params, state, {"tokens": tokens})
    test = MarkovText("test", length=32, symbols=6)
    batch = {"tokens": np.stack([test[i]["tokens"] for i in range(256)])}
    loss = metrics.compute(jax.jit(task.evaluate)(params, batch))["loss"]
    assert 0.97 < loss / source.entropy < 1.05


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "has no tokens"),
        ({"tokens": np.full((1, 4), 40, np.int32)}, "token 40 at place 0 of row 0 is outside"),
        ({"tokens": np.array([[1, -1]]), "index": [7]}, "token -1 at place 1 of example 7"),
        ({"tokens": np.zeros((1, 4), np.float32)}, r"must be \[b, t\] integers"),
    ],
)  # fmt: skip
def test_bad_batches_are_refused(batch, message):
    with pytest.raises(RecipeError, match=message):
        make()[0].check(batch)


def test_bad_segments_are_refused():
    task, _ = make(packed=True)
    with pytest.raises(RecipeError, match="has no segments"):
        task.check(draw())
    with pytest.raises(RecipeError, match="at least 0"):
        task.check(draw() | {"segments": np.full((2, 12), -1, np.int32)})


@pytest.mark.parametrize(
    "options", [{"z_loss": -1.0}, {"logits_chunk": -1}, {"bytes_per_token": 0.0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(RecipeError, match=f"task.{next(iter(options))}"):
        LanguageModelling(build("decoder"), **options)


def test_models_that_are_no_language_models_are_refused():
    with pytest.raises(RecipeError, match="Dense is no language model"):
        LanguageModelling(nn.Dense(3))
    with pytest.raises(RecipeError, match="see what they should predict"):
        LanguageModelling(build("decoder", attention="bidirectional"))


@pytest.mark.parametrize(
    "path",
    [
        "configs/decoder/smoke.py",
        "configs/decoder/seven_b_million.py:usp",
        "configs/unified_long_sequence/million.py",
    ],
)
def test_recipes_fit_their_data(path):
    """What the dry run checks before it builds anything, without a million tokens of data."""
    loaded = recipe.load(path).validate()
    from attnjax.train.program import build_task

    task = build_task(loaded)
    assert task.example(1)["tokens"].shape[1] == loaded.data.source["length"]
    assert jnp.dtype(task.example(1)["tokens"].dtype) == jnp.int32
