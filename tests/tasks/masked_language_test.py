# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: what counts, what is reported, and that attention is learned."""

import functools

import jax
import numpy as np
import optax
import pytest

from attnjax import metrics
from attnjax.errors import RecipeError
from attnjax.models.load import abstract_params, build
from attnjax.tasks import MaskedLanguageModelling, Task
from attnjax.weights import flatten, unflatten

TOLERANCE = 1e-5
KEY = jax.random.key(0)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def make(**options):
    model = build("encoder", vocab_size=40, width=32, hidden=48, length=12, dropout=0.0)
    task = MaskedLanguageModelling(model, **options)
    return task, parameters(model)


def parameters(model, seed=0):
    """Drawn without running the model."""
    rng = np.random.default_rng(seed)
    shapes = flatten(abstract_params(model))
    leaves = {k: 0.2 * rng.standard_normal(x.shape, np.float32) for k, x in shapes.items()}
    return unflatten({k: x + k.endswith("scale") for k, x in leaves.items()})


def draw(b=2):
    rng = np.random.default_rng(0)
    target = rng.integers(4, 40, size=(b, 12)).astype(np.int32)
    scored = rng.random((b, 12)) < 0.4
    return {"tokens": np.where(scored, 3, target).astype(np.int32), "target": target,
            "scored": scored}  # fmt: skip


def by_hand(task, params, batch):
    run = quick(lambda p, x: task.model.apply({"params": p}, x).logits)
    logits = np.asarray(run(params, batch["tokens"]), np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    return logits, lse - np.take_along_axis(logits, batch["target"][..., None], -1)[..., 0]


def test_loss_is_the_mean_over_hidden_tokens():
    task, params = make(logits_chunk=5)
    assert isinstance(task, Task) and task.inputs == ("tokens", "target", "scored")
    batch = draw()
    loss, values = quick(task.loss)(params, batch, KEY, 0)
    logits, nll = by_hand(task, params, batch)
    mean = nll[batch["scored"]].mean()
    hits = (logits.argmax(-1) == batch["target"])[batch["scored"]].mean()
    np.testing.assert_allclose(loss, mean, rtol=TOLERANCE)
    np.testing.assert_allclose(values["perplexity"], np.exp(mean), rtol=TOLERANCE)
    np.testing.assert_allclose(values["accuracy"], hits, rtol=TOLERANCE)


def test_evaluation_counts_valid_examples_and_predictions_keep_what_is_shown():
    task, params = make()
    batch = draw(3) | {"valid": np.array([True, False, True])}
    values = metrics.compute(quick(task.evaluate)(params, batch))
    logits, nll = by_hand(task, params, batch)
    counts = batch["scored"] & batch["valid"][:, None]
    assert values["loss"] == pytest.approx(nll[counts].mean(), rel=TOLERANCE)
    assert values["perplexity"] == pytest.approx(np.exp(nll[counts].mean()), rel=TOLERANCE)
    found = quick(task.predict)(params, batch)["prediction"]
    expected = np.where(batch["scored"], logits.argmax(-1), batch["tokens"])
    np.testing.assert_array_equal(found, expected)
    shown = quick(task.explain)(params, batch)
    np.testing.assert_array_equal(shown["prediction"], expected)
    assert all(byx.shape == (3, 1, 12) for byx in shown["maps"].values())


@pytest.mark.slow
def test_hidden_tokens_are_learned_from_those_around():
    """Every text is one letter, so that nothing is left to guess."""
    model = build("encoder", vocab_size=40, width=32, hidden=48, length=12, depth=1, dropout=0.0)
    task = MaskedLanguageModelling(model)
    params, optimizer = task.init(KEY, task.example(1)), optax.adam(1e-2)
    rng = np.random.default_rng(0)
    target = np.repeat(rng.integers(4, 40, size=(150, 32, 1)), 12, axis=-1).astype(np.int32)
    scored = rng.random(target.shape) < 0.3
    batches = {"tokens": np.where(scored, 3, target).astype(np.int32), "target": target,
               "scored": scored}  # fmt: skip

    @quick
    def train(params, state):
        def step(carry, batch):
            params, state = carry
            (loss, _), gradient = jax.value_and_grad(task.loss, has_aux=True)(params, batch, KEY, 0)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, state), batches)[1]

    losses = train(params, optimizer.init(params))
    assert losses[0] > 3 and losses[-1] < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "has no target"),
        ({"target": np.full((2, 12), 40, np.int32)}, "target token 40 at place 0 of row 0"),
        ({"scored": np.zeros((2, 12), bool)}, "nothing is to be guessed"),
        ({"tokens": np.zeros((2, 12), np.float32)}, "integers"),
    ],
)
def test_bad_batches_are_refused(change, message):
    batch = {name: value for name, value in (draw() | change).items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        make()[0].check(batch)


def test_models_without_a_head_are_refused():
    with pytest.raises(RecipeError, match="no head for hidden tokens"):
        MaskedLanguageModelling(build("encoder", head="none"))
    with pytest.raises(RecipeError, match="no head for hidden tokens"):
        MaskedLanguageModelling(build("gpt2"))
    with pytest.raises(RecipeError, match="logits_chunk=-1"):
        MaskedLanguageModelling(build("encoder"), logits_chunk=-1)
