# SPDX-License-Identifier: Apache-2.0
"""Tasks of speech: losses by hand, what counts, distortions, refusals, two steps of training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import audio, metrics, recipe
from attnjax.data.speech import SyntheticSpeech
from attnjax.errors import RecipeError
from attnjax.losses import mean_error
from attnjax.metrics.speech import mel_cepstral_distortion
from attnjax.models import build
from attnjax.models.load import abstract_params
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.recipe import Checkpoint, Evaluation, Report
from attnjax.tasks import ParallelSpeech, StepwiseSpeech, Task
from attnjax.train.loop import run
from attnjax.weights import flatten, unflatten

SIZES = {"vocab_size": 16, "length": 6, "frames": 32, "width": 16, "depths": (1, 1),
         "num_heads": 2, "hidden": 16}  # fmt: skip
MODELS = {
    "parallel": (ParallelSpeech, "fastspeech2", {"kernel": 3, "variance": {"width": 8}}),
    "stepwise": (StepwiseSpeech, "transformer_tts", {}),
}
NORMAL = {"mel_mean": -4.0, "mel_deviation": 2.0}
KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def make(kind, **options):
    task_class, name, own = MODELS[kind]
    model = build(name, **SIZES, **own)
    rng = np.random.default_rng(0)
    draw = lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    leaves = {path: draw(leaf) for path, leaf in flatten(abstract_params(model)).items()}
    # So that durations are some frames and the end is not reached at once.
    leaves = {k: x + 1.0 if k.endswith("duration_predictor/head/bias") else x
              for k, x in leaves.items()}  # fmt: skip
    return task_class(model, **NORMAL, **options), unflatten(leaves)


@functools.cache
def batch():
    source = SyntheticSpeech(size=3, length=6, frames=32)
    examples = [source[i] for i in range(3)]
    return {name: np.stack([x[name] for x in examples]) for name in examples[0]}


def given(task):
    return {name: batch()[name] for name in task.inputs}


@pytest.mark.parametrize("kind", MODELS)
def test_contract(kind):
    task, _ = make(kind)
    assert isinstance(task, Task)
    assert set(task.example(3)) == set(task.inputs)
    for name, x in task.example(3).items():
        assert (x.shape, x.dtype) == (batch()[name].shape, batch()[name].dtype)
    task.check(given(task))
    assert task.flops == 3 * task.model.flops() > 0
    np.testing.assert_allclose(task.raw(task.normal(batch()["mel"][:, :5])), batch()["mel"][:, :5],
                               atol=1e-5)  # fmt: skip


def terms_by_hand(task, params):
    """Terms of the loss from the model's output, with Python's loops over what exists."""
    rows, b = range(3), batch()
    mel = (b["mel"] + 4) / 2
    inputs = {name: b[name] for name in task.model.example(3)} | (
        {"mel": mel} if isinstance(task, StepwiseSpeech) else {}
    )
    output = jax.jit(lambda p: task.model.apply({"params": p}, **inputs), compiler_options=QUICK)(
        params
    )
    frames = np.asarray(output.frames)
    differ = lambda x: np.concatenate([(x[i] - mel[i])[: frames[i]].ravel() for i in rows])
    if isinstance(task, ParallelSpeech):
        np.testing.assert_array_equal(frames, b["frames"])
        valid = b["phonemes"] > 0
        square = lambda x, y: np.mean((np.asarray(x) - y)[valid] ** 2)
        return {
            "mel": np.abs(differ(output.mel)).mean(),
            "duration": square(output.log_duration, np.log(b["duration"] + 1.0)),
            "pitch": square(output.pitch, b["pitch"]),
            "energy": square(output.energy, b["energy"]),
        }
    np.testing.assert_array_equal(frames, b["frames"] // 4 * 4)
    log = lambda x: -np.log1p(np.exp(-np.float64(x)))
    ends = []
    for i in rows:
        logits = output.end[i, : frames[i] // 4]
        ends += [-log(-x) for x in logits[:-1]] + [-5 * log(logits[-1])]
    return {
        "absolute": np.abs(differ(output.mel)).mean(),
        "squared": np.square(differ(output.mel)).mean(),
        "coarse_absolute": np.abs(differ(output.coarse)).mean(),
        "coarse_squared": np.square(differ(output.coarse)).mean(),
        "end": np.mean(ends),
    }


@pytest.mark.parametrize(
    ("kind", "distortion"),
    [
        ("parallel", True),
        ("stepwise", False),
        pytest.param("stepwise", True, marks=pytest.mark.slow),
    ],
)
def test_evaluation_is_the_loss_by_hand_and_the_distortion_of_what_is_spoken(kind, distortion):
    task, params = make(kind, iterations=2, distortion=distortion)
    rows = given(task) | {"valid": np.array([True] * 3)}
    evaluate = jax.jit(task.evaluate, compiler_options=QUICK)
    found = metrics.compute(evaluate(params, rows))
    expected = terms_by_hand(task, params)
    assert set(found) == {*expected, *(("mcd", "msd", "frames") if distortion else ())}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert all(np.isfinite(x) and x > 0 for x in found.values())
    # Rows that are not valid count nowhere, whatever they hold.
    alone = metrics.compute(evaluate(params, rows | {"valid": np.array([True, False, False])}))
    broken = {k: np.copy(x) for k, x in rows.items()} | {"valid": np.array([True, False, False])}
    broken["mel"][1:] = np.nan
    again = metrics.compute(evaluate(params, broken))
    assert alone != found
    assert again == pytest.approx(alone, rel=1e-6)


def test_speech_as_good_as_its_target_has_no_distortion():
    """With the target's own frames spoken, both distortions are 0; shifted ones are not."""
    task, _ = make("parallel", iterations=2)
    b = batch()
    frames = jnp.asarray(b["frames"])

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def measure(louder):
        reference, lengths = task.vocode(b["mel"], frames)
        spoken, _ = task.vocode(b["mel"] + louder, frames)
        options = {"reference_lengths": lengths, "synthesised_lengths": lengths}
        return mel_cepstral_distortion(reference, spoken, 22_050, **options), lengths

    same, lengths = measure(0.0)
    assert same.compute() == 0
    np.testing.assert_array_equal(lengths, 256 * (b["frames"] - 1))
    # Twice as loud: log 4 in every band, so sqrt(80) log 4 in the first of 13 coefficients.
    twice, _ = measure(float(np.log(2)))
    frames = audio.frame_count(np.asarray(lengths), 275)
    assert int(twice.weight) == frames.sum()
    assert twice.compute() == pytest.approx(np.sqrt(80 / 13) * np.log(4), rel=0.1)


@pytest.mark.parametrize("kind", ["parallel", pytest.param("stepwise", marks=pytest.mark.slow)])
def test_a_step_of_training_uses_its_key(kind):
    task, params = make(kind)
    step = jax.jit(task.loss, compiler_options=QUICK)
    first, terms = step(params, given(task), KEY, 0)
    again, _ = step(params, given(task), KEY, 1)
    other, _ = step(params, given(task), jax.random.key(1), 0)
    assert float(first) == float(again) != float(other)
    assert float(first) == pytest.approx(sum(float(x) for x in terms.values()), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_devices_change_nothing(kind):
    task, params = make(kind)
    rows = {name: np.concatenate([x, x[:1]]) for name, x in given(task).items()}
    term = lambda p, x: sum(mean_error(error) for error in task.errors(p, x).values())
    step = jax.jit(jax.value_and_grad(term), compiler_options=QUICK)
    loss, gradients = step(params, rows)
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(params, mesh, task.param_axes)[0])
        again, found = step(placed, jax.device_put(rows, batch_sharding(mesh)))
    assert float(again) == pytest.approx(float(loss), rel=1e-5)
    for path, leaf in flatten(jax.device_get(found)).items():
        np.testing.assert_allclose(leaf, flatten(gradients)[path], atol=2e-5, err_msg=path)


def test_predictions_are_raw_frames():
    task, params = make("parallel")
    found = jax.jit(task.predict, compiler_options=QUICK)(params, given(task))
    assert found["mel"].shape == (3, 32, 80) and found["frames"].shape == (3,)
    assert found["mel"].min() >= np.float32(np.log(1e-5))
    shown = jax.eval_shape(task.explain, params, given(task))
    assert shown["prediction"].shape == (3, 32, 80)
    assert [x.shape for x in shown["maps"].values()] == [(3, 32, 32)]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("parallel", {"mel": np.zeros((3, 31, 80), np.float32)}, r"mel has shape \(3, 31, 80\)"),
        ("parallel", {"phonemes": np.full((3, 6), 16)}, "row 0 has phonemes outside 0 to 15"),
        ("stepwise", {"frames": np.array([9, 33, 1])}, "row 1 has frames that are not between 1"),
        ("parallel", {"duration": np.zeros((3, 6), int)}, "row 0 has frames that are not between"),
        ("stepwise", {"phonemes": np.zeros((3, 6), int)}, "row 0 has no phonemes"),
        ("stepwise", {"mel": np.full((3, 32, 80), np.nan)}, "row 0 has mel that is not finite"),
    ],
)
def test_bad_batches_are_refused(kind, change, message):
    task, _ = make(kind)
    with pytest.raises(RecipeError, match=message):
        task.check(given(task) | change)
    with pytest.raises(RecipeError, match="the data has no mel"):
        task.check({name: x for name, x in given(task).items() if name != "mel"})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("parallel", {"mel_deviation": 0.0}, "task.mel_deviation=0.0: must be above 0"),
        ("parallel", {"mel_mean": [0.0, 1.0]}, "task.mel_mean=.*: must be a number, or 80"),
        ("parallel", {"iterations": -1}, "task.iterations=-1"),
        ("parallel", {"rate": 8_000}, "task.rate=8000"),
        ("stepwise", {"threshold": 1.0}, "task.threshold=1.0"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    task_class, name, own = MODELS[kind]
    with pytest.raises(RecipeError, match=message):
        task_class(build(name, **SIZES, **own), **options)


def test_models_that_read_something_else_are_refused():
    with pytest.raises(RecipeError, match="needs a model of phonemes, mel, frames; FastSpeech2"):
        StepwiseSpeech(build("fastspeech2", "tiny"))


@pytest.mark.parametrize(
    "name", ["fastspeech2", pytest.param("transformer_tts", marks=pytest.mark.slow)]
)
def test_two_steps_of_the_recipe(name, tmp_path, monkeypatch):
    """The trainer from data to metrics, smaller by some overridden numbers."""
    monkeypatch.setattr(
        "attnjax.train.loop.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1])
    )
    loaded = recipe.load(f"configs/cab/{name}.py")
    sizes = {"length": 6, "frames": 32}
    loaded.model |= {**sizes, "width": 16, "depths": (1, 1), "num_heads": 2, "hidden": 16}
    loaded.model |= MODELS[{"fastspeech2": "parallel"}.get(name, "stepwise")][2]
    loaded.task |= {"distortion": False}
    loaded.optim.warmup = 0
    loaded.data.source |= {**sizes, "size": 8}
    held = dataclasses.replace(loaded.data, source=loaded.data.source | {"split": "test"})
    loaded = dataclasses.replace(
        loaded, steps=2, batch=4, evals={"test": Evaluation(data=held, batch=4)},
        checkpoint=Checkpoint(every=2, keep=1),
        report=Report(every=1, tensorboard=False, samples=0),
    )  # fmt: skip
    result = run(loaded.validate(), tmp_path)
    assert result.step == 2
    assert all(np.isfinite(x) for x in result.metrics.values())
    assert {"test/pitch", "test/end"} & set(result.metrics)
