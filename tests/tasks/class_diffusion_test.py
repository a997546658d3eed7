# SPDX-License-Identifier: Apache-2.0
"""Diffusion of classes: the loss by hand, samples of class and key only, a short run."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import metrics, recipe
from attnjax.errors import RecipeError
from attnjax.models.dit import Output
from attnjax.models.load import build
from attnjax.ops import diffusion
from attnjax.ops import learned_variance as variance
from attnjax.parallel import make_mesh
from attnjax.recipe import Mesh
from attnjax.tasks import ClassDiffusion, Task
from attnjax.train import loop
from attnjax.train.program import build as build_program

KEY = jax.random.key(0)
CLOSE = 1e-5
QUICK = {"xla_backend_optimization_level": 0}


class Pointwise(nn.Module):
    """Sees in every pixel a multiple of it, of the class and of the time."""

    num_classes: int = 3
    drop_label: float = 0.1
    has_variance: bool = True

    no_class = 3

    @nn.compact
    def __call__(self, noisy, time, label, *, train=False):
        weight = self.param("weight", nn.initializers.constant(0.5), (4,))
        told = weight[1] * label + weight[2] * time / 1_000
        noise = weight[0] * noisy + told.reshape(-1, 1, 1, 1)
        noise = nn.Dropout(0.5, deterministic=not train)(noise)
        parts = [noise, weight[3] * noisy] if self.has_variance else [noise]
        return Output(prediction=jnp.concatenate(parts, axis=-1), aux={})

    def example(self, batch):
        return {
            "noisy": jax.ShapeDtypeStruct((batch, 4, 4, 2), jnp.float32),
            "time": jax.ShapeDtypeStruct((batch,), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def flops(self):
        return 1.0

    def attention_maps(self, captured):
        return {}


@functools.cache
def make(has_variance=True, **options):
    task = ClassDiffusion(Pointwise(has_variance=has_variance), **{"sample_steps": 5} | options)
    return task, task.init(KEY, task.example(1))


def draw(b=3, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (b, 4, 4, 2)).astype(np.float32)
    return {"image": image, "label": np.arange(b, dtype=np.int32) % 3}


def test_it_is_a_task():
    task, params = make()
    assert isinstance(task, Task) and task.inputs == ("image", "label") and task.flops == 3
    assert {n: x.shape for n, x in task.example(2).items()} == {
        "image": (2, 4, 4, 2), "label": (2,),
    }  # fmt: skip
    assert params["weight"].shape == (4,) and len(task.times) == 5 and len(task.levels) == 1_001
    shown = jax.eval_shape(task.explain, params, draw())
    assert shown["prediction"].shape == shown["real"].shape == (3, 4, 4, 2) and not shown["maps"]


def test_errors_by_hand():
    """The squares and the bound of given noise and times, the latter weighted by T / 1000."""
    for steps in (1_000, 500):
        task, params = make(steps=steps)
        batch, index = draw(), np.array([0, 7, steps - 1])
        noise = np.random.default_rng(1).standard_normal(batch["image"].shape).astype(np.float32)
        level = task.levels[index + 1][:, None, None, None]
        noisy = level * batch["image"] + np.sqrt(1 - level**2) * noise
        told = 0.5 * batch["label"] + 0.5 * index / 1_000
        seen = 0.5 * noisy + told[:, None, None, None]
        squares, bound, _ = task._errors(params, batch, noise, index)
        np.testing.assert_allclose(squares, np.square(noise - seen).mean((1, 2, 3)), rtol=CLOSE)
        at = variance.at_time(task.steps, index, 4)
        parts = [jnp.asarray(x, jnp.float32) for x in (batch["image"], noisy, seen, 0.5 * noisy)]
        expected = variance.variational_bound(*parts, at) * steps / 1_000
        np.testing.assert_allclose(bound, expected, rtol=1e-3)


def test_loss_follows_its_key():
    task, params = make()
    run = jax.jit(task.loss, compiler_options=QUICK)
    loss, values = run(params, draw(), KEY, 0)
    assert loss == values["noise_error"] + values["bound"] and loss.dtype == jnp.float32
    assert float(run(params, draw(), KEY, 0)[0]) == float(loss)
    assert float(run(params, draw(), jax.random.key(1), 0)[0]) != float(loss)
    plain, params = make(has_variance=False)
    loss, values = jax.jit(plain.loss, compiler_options=QUICK)(params, draw(), KEY, 0)
    assert values["bound"] == 0 and loss == values["noise_error"] and plain.eta == 1.0


def test_balance_of_heads_counts():
    fields = {"num_classes": 3, "image_size": 4, "channels": 2, "width": 8, "depth": 1}
    fields |= {"mixture": ((1, 4, 1, 1),), "drop_label": 0.5}
    task = ClassDiffusion(build("dit", **fields), balance=0.5)
    params = task.init(KEY, {})
    run = jax.jit(jax.value_and_grad(task.loss, has_aux=True), compiler_options=QUICK)
    (loss, values), grads = run(params, draw(), KEY, 0)
    assert set(values) == {"noise_error", "bound", "balance_loss", "dropped"}
    expected = values["noise_error"] + values["bound"] + 0.5 * values["balance_loss"]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6) and values["dropped"] == 0
    assert 0.9 < float(values["balance_loss"]) < 3
    # In a new model nothing but the balance reaches the routers: gates of blocks are closed.
    assert np.abs(grads["block_0"]["router"]["routed"]["kernel"]).max() > 1e-5


def test_times_and_noise_are_as_meant():
    """The mean loss over many draws is that over all times and noises."""
    task, params = make(steps=20)
    batch = {"image": np.zeros((2_000, 4, 4, 2), np.float32), "label": np.zeros(2_000, np.int32)}
    spread = np.sqrt(1 - task.levels[1:] ** 2)
    time = 0.5 * np.arange(20) / 1_000
    # Half of what is seen is dropped, the other half doubled.
    error = lambda scale: (1 - 0.5 * scale * spread) ** 2 + (scale * time) ** 2
    expected = np.mean(0.5 * error(0) + 0.5 * error(2))
    _, values = jax.jit(task.loss, compiler_options=QUICK)(params, batch, KEY, 0)
    assert float(values["noise_error"]) == pytest.approx(expected, rel=0.05)


def test_samples_depend_on_class_key_and_nothing_else():
    task, params = make(clip=True)
    run = jax.jit(task.sample, compiler_options=QUICK)
    keys, label = jax.random.split(KEY, 3), np.array([0, 1, 2], np.int32)
    out = np.asarray(run(params, label, keys))
    assert out.shape == (3, 4, 4, 2) and out.dtype == np.float32
    np.testing.assert_allclose(run(params, label[::-1], keys[::-1])[::-1], out, atol=CLOSE)
    other = np.asarray(run(params, np.array([0, 2, 2], np.int32), keys))
    np.testing.assert_allclose(other[[0, 2]], out[[0, 2]], atol=CLOSE)
    assert np.abs(other[1] - out[1]).max() > 1e-3
    batch = draw()
    made = np.asarray(jax.jit(task.predict, compiler_options=QUICK)(params, batch)["prediction"])
    one = {name: x[1:2] for name, x in batch.items()}
    np.testing.assert_allclose(task.predict(params, one)["prediction"], made[1:2], atol=CLOSE)


@pytest.mark.parametrize("eta", [-1.0, 0.0])
def test_guidance_is_a_mixture_of_two_answers(eta):
    """The network is linear in the class: guidance by s is class s c + (1 - s) 3."""
    guided, params = make(guidance=1.5, guided_channels=1, eta=eta)
    keys, label = jax.random.split(KEY, 2), np.array([0, 2], np.int32)
    out = guided.sample(params, label, keys)

    def predict(noisy, time):
        answer = lambda label: guided.model.apply({"params": params}, noisy, time, label).prediction
        plain, pushed = answer(label), answer(1.5 * label - 0.5 * 3)
        seen = jnp.concatenate([pushed[..., :1], plain[..., 1:]], axis=-1)
        return seen[..., :2], seen[..., 2:]

    levels, times = guided.levels, guided.times
    eta = None if eta < 0 else eta
    expected = variance.sample(predict, keys, (4, 4, 2), levels, times, eta=eta)
    np.testing.assert_allclose(out, expected, atol=1e-4 * np.abs(expected).max())
    every, _ = make(guidance=1.5, guided_channels=0)
    assert every.guided_channels == 2 and make()[0].guided_channels == 2


def test_metrics_of_a_batch():
    task, params = make(judge=True, clip=True)
    batch = draw(18) | {"valid": np.arange(18) < 15}
    run = jax.jit(task.evaluate, compiler_options=QUICK)
    values = metrics.compute(run(params, batch))
    assert set(values) == {"loss", "noise_error", "bound", "recognised", "recognised_real",
                           "frechet", "frechet_real"}  # fmt: skip
    assert np.isfinite(list(values.values())).all()
    assert values["loss"] == pytest.approx(values["noise_error"] + values["bound"], rel=1e-5)
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 9), slice(9, 18))]
    merged = metrics.compute(metrics.merge(*(run(params, part) for part in parts)))
    for name, value in values.items():
        assert merged[name] == pytest.approx(value, rel=1e-3), name
    quiet, _ = make()
    assert set(quiet.evaluate(params, batch)) == {"loss", "noise_error", "bound"}


def test_keys_come_from_pictures():
    pixels = np.random.default_rng(0).integers(256, size=(3, 4, 4, 1)).astype(np.uint8)
    data = lambda keys: {tuple(map(int, k)) for k in jax.vmap(jax.random.key_data)(keys)}
    keys = data(diffusion.content_keys(0, pixels))
    assert len(keys | data(diffusion.content_keys(0, pixels[:, ::-1]))) == 6
    assert data(diffusion.content_keys(0, pixels[::-1])) == keys
    assert not data(diffusion.content_keys(1, pixels)) & keys


@pytest.mark.slow
def test_two_steps_through_the_trainer(tmp_path, quick):
    """Latents from a file, guided samples, evaluation by what is recognised."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", latents=rng.standard_normal((16, 4, 4, 2)).astype(np.float16),
             labels=np.arange(16) % 4)  # fmt: skip
    run = recipe.load("configs/dit/smoke.py")
    run.steps, run.batch = 2, 8
    source = {"name": "latent_files", "path": str(tmp_path / "a.npz")}
    run.data.source = source
    run.evals["test"].data.source, run.evals["test"].batch = source, 8
    run.model |= {"image_size": 4, "channels": 2, "width": 8, "depth": 1, "num_heads": 2}
    run.task |= {"sample_steps": 2, "guidance": 1.5, "clip": True}
    run.report.tensorboard = False
    result = loop.run(run.validate(), tmp_path / "run")
    assert result.step == 2 and {f"test/{n}" for n in ("loss", "recognised", "frechet")} <= set(
        result.metrics
    )
    assert all(np.isfinite(x) for x in result.metrics.values())


def test_refusals():
    for options, message in (
        ({"steps": 0}, "steps=0"),
        ({"sample_steps": 1_001}, "steps=1001: must be in 2 to 1000"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"eta": -0.5}, "eta=-0.5"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"last_beta": 1.0}, "last=1.0"),
        ({"balance": -1.0}, "balance=-1.0"),
    ):
        with pytest.raises(RecipeError, match=message):
            ClassDiffusion(Pointwise(), **options)
    with pytest.raises(RecipeError, match=r"guidance=1\.5: needs a model with drop_label"):
        ClassDiffusion(Pointwise(drop_label=0.0), guidance=1.5)
    with pytest.raises(RecipeError, match="needs a model of noisy, time, label"):
        ClassDiffusion(build("sequence_mixer", vocab=5))
    task, _ = make()
    task.check(draw())
    for change, message in (
        (lambda b: b.pop("label"), "the data has no label"),
        (lambda b: b.update(image=b["image"][:, :2]), r"'image' is float32\[3, 2, 4, 2\]"),
        (lambda b: b.update(label=b["label"].astype(np.float32)), "must be .b. integers"),
        (lambda b: b["label"].__setitem__(1, 3), "label 3 of row 1 is outside 0 to 2"),
        (lambda b: b["image"].__setitem__((2, 0, 0, 0), np.nan), "'image' of row 2 holds NaN"),
    ):
        batch = draw()
        change(batch)
        with pytest.raises(RecipeError, match=message):
            task.check(batch)


def one_step(sizes, devices):
    """Loss, gradient norm and metrics of one step of the recipe with heads as experts."""
    run = recipe.load("configs/moh/dit_digits.py:moh_75")
    run.batch, run.mesh = 8, Mesh(**sizes)
    run.model |= {"width": 48, "depth": 2, "mixture": ((1, 6, 2, 1), (1, 6, 6, 0))}
    run.task |= {"judge": False}
    mesh = make_mesh(dataclasses.asdict(run.mesh), jax.devices()[:devices])
    program = build_program(run.validate(), mesh)
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, program.batch["image"].shape).astype(np.float32)
    batch = {"image": image, "label": np.arange(8, dtype=np.int32)}
    with jax.set_mesh(mesh):
        _, values = program.step(program.init(), program.to_device(batch))
    return {k: float(values[k]) for k in ("loss", "grad_norm", "bound", "balance_loss")}


@pytest.mark.slow
def test_step_on_eight_devices():
    """The balance is that of the global batch, however it is divided."""
    alone = one_step({"data": 1}, 1)
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "model": 2}):
        assert one_step(sizes, 8) == pytest.approx(alone, rel=1e-4), sizes


@pytest.mark.slow
def test_recipe_reaches_what_it_says(tmp_path):
    """Digits that a classifier takes for their class as often as not quite the real ones."""
    result = loop.run(recipe.load("configs/moh/dit_digits.py:moh_75"), tmp_path)
    assert result.metrics["samples/recognised"] > 0.85
    assert result.metrics["samples/recognised_real"] > 0.98
    assert result.metrics["samples/frechet"] < 1.2
