# SPDX-License-Identifier: Apache-2.0
"""Sequence to sequence: losses by hand, greedy decoding, and that copying is learned."""

import functools

import jax
import numpy as np
import optax
import pytest

from attnjax import metrics
from attnjax.data.pairs import CopySort
from attnjax.errors import RecipeError
from attnjax.models.load import abstract_params, build
from attnjax.tasks import SequenceToSequence, Task
from attnjax.tasks.sequence_to_sequence import read_before
from attnjax.weights import flatten, unflatten

TOLERANCE = 1e-5
KEY = jax.random.key(0)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SOURCE = {"length": 5, "symbols": 8}


@functools.cache
def make(**options):
    model = build(
        "encoder_decoder", vocab_size=11, lengths=(5, 6), width=32, hidden=64, depth=(1, 1),
        dropout=0.0,
    )  # fmt: skip
    task = SequenceToSequence(model, **options)
    return task, parameters(model)


def parameters(model, seed=0):
    """Drawn without running the model."""
    rng = np.random.default_rng(seed)
    shapes = flatten(abstract_params(model))
    leaves = {k: 0.2 * rng.standard_normal(x.shape, np.float32) for k, x in shapes.items()}
    return unflatten({k: x + k.endswith("scale") for k, x in leaves.items()})


def draw(b=2, split="train", first=0):
    source = CopySort(split, **SOURCE)
    rows = [source[first + i] for i in range(b)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def by_hand(task, params, batch):
    before = np.concatenate([np.ones((len(batch["target"]), 1), int), batch["target"][:, :-1]], 1)
    np.testing.assert_array_equal(read_before(batch["target"]), before)
    run = quick(lambda p, *x: task.model.apply({"params": p}, *x).logits)
    logits = np.asarray(run(params, batch["source"], before.astype(np.int32)), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p, -np.take_along_axis(log_p, batch["target"][..., None], -1)[..., 0]


def test_loss_is_the_mean_over_what_is_no_padding():
    smoothing = 0.1
    task, params = make(label_smoothing=smoothing, logits_chunk=4)
    assert isinstance(task, Task) and task.inputs == ("source", "target")
    batch = draw()
    batch["target"][1, 3:] = [2, 0, 0]
    loss, values = quick(task.loss)(params, batch, KEY, 0)
    log_p, nll = by_hand(task, params, batch)
    counts = batch["target"] != 0
    assert counts.sum() == 10
    smoothed = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
    np.testing.assert_allclose(loss, smoothed[counts].mean(), rtol=TOLERANCE)
    np.testing.assert_allclose(values["perplexity"], np.exp(nll[counts].mean()), rtol=TOLERANCE)
    hits = (log_p.argmax(-1) == batch["target"])[counts].mean()
    np.testing.assert_allclose(values["accuracy"], hits, rtol=TOLERANCE)


@functools.cache
def trained():
    """A task that has learned to copy, and its parameters."""
    task, _ = make()
    params, optimizer = task.init(KEY, task.example(1)), optax.adam(1e-2)

    @quick
    def train(params, state, batches):
        def step(carry, batch):
            params, state = carry
            gradient, _ = jax.grad(task.loss, has_aux=True)(params, batch, KEY, 0)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    batches = {k: x.reshape(250, 32, -1) for k, x in draw(250 * 32).items()}
    params, _ = train(params, optimizer.init(params), batches)
    return task, params


@pytest.mark.slow
def test_copying_is_learned_and_greedy_decoding_writes_it():
    task, params = trained()
    batch = draw(128, "test") | {"valid": np.arange(128) < 120}
    values = metrics.compute(quick(task.evaluate)(params, batch))
    assert values["accuracy"] > 0.95 and values["perplexity"] == pytest.approx(
        np.exp(values["loss"])
    )
    written = quick(task.predict)(params, batch)["prediction"]
    exact = (written == batch["target"]).all(axis=1)[:120].mean()
    assert exact == values["exact_match"] > 0.8
    shown = quick(task.explain)(params, batch)
    assert all(byx.shape == (128, 1, 5) for byx in shown["maps"].values())


def test_what_is_decoded_is_likeliest_at_every_place():
    task, params = make()
    batch = draw()
    written = quick(task.predict)(params, batch)["prediction"]
    values = metrics.compute(quick(task.evaluate)(params, batch | {"target": written}))
    assert written.shape == (2, 6) and values["exact_match"] == values["accuracy"] == 1
    values = metrics.compute(quick(task.evaluate)(params, batch))
    assert values["exact_match"] == 0 and values["accuracy"] < 1
    assert values["perplexity"] == pytest.approx(np.exp(values["loss"]))


def test_decoding_keeps_its_limits():
    """With a hidden unit that is always large, and an end that grows with it."""
    task, params = make()
    kernel = np.zeros((32, 11), np.float32)
    kernel[0, 2] = 1.0
    decoder = params["decoder"]
    bias = decoder["mlp_norm"]["bias"].copy()
    bias[:, 0] = 50.0
    normal = decoder["mlp_norm"] | {"bias": bias}
    params = params | {"head": {"kernel": kernel}, "decoder": decoder | {"mlp_norm": normal}}
    batch = draw()
    free = quick(task.predict)(params, batch)["prediction"]
    assert free.tolist() == [[2, 0, 0, 0, 0, 0]] * 2
    limited = SequenceToSequence(task.model, shortest=2, longest=4)
    written = quick(limited.predict)(params, batch)["prediction"]
    # Of what is left all are alike: the first.
    assert written.tolist() == [[0, 0, 2, 0]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "has no target"),
        ({"source": np.full((2, 5), 11, np.int32)}, "source token 11 at place 0 of row 0"),
        ({"target": np.zeros((2, 6), np.int32)}, "nothing is to be written"),
    ],
)
def test_bad_batches_are_refused(change, message):
    batch = {name: value for name, value in (draw() | change).items() if value is not None}
    with pytest.raises(RecipeError, match=message):
        make()[0].check(batch)


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 1.0}, {"logits_chunk": -1}, {"shortest": 7}, {"longest": 7}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(RecipeError, match=f"task.{next(iter(options))}"):
        SequenceToSequence(make()[0].model, **options)


def test_models_that_write_nothing_are_refused():
    with pytest.raises(RecipeError, match="Encoder has no begin, step"):
        SequenceToSequence(build("encoder"))
