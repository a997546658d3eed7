# SPDX-License-Identifier: Apache-2.0
"""Super-resolution: the loss by hand, samples that depend on their picture only, a short run."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from attnjax import metrics, recipe
from attnjax.errors import RecipeError
from attnjax.metrics import psnr, ssim, to_uint8
from attnjax.models.load import build
from attnjax.models.sr3 import Output
from attnjax.ops import diffusion
from attnjax.parallel import make_mesh
from attnjax.recipe import Mesh
from attnjax.tasks import SuperResolution, Task
from attnjax.train import loop
from attnjax.train.program import build as build_program

KEY = jax.random.key(0)
TOLERANCE = 1e-5
QUICK = {"xla_backend_optimization_level": 0}


class Pointwise(nn.Module):
    """Sees in every pixel a multiple of it, of the enlarged picture's and of the level."""

    @nn.compact
    def __call__(self, noisy, low, noise_level, *, train=False):
        weight = self.param("weight", nn.initializers.ones, (3,))
        level = jnp.broadcast_to(noise_level[:, None, None, None], noisy.shape)
        out = weight[0] * noisy + weight[1] * low + weight[2] * level
        return Output(noise=nn.Dropout(0.5, deterministic=not train)(out), aux={})

    def example(self, batch):
        picture = jax.ShapeDtypeStruct((batch, 12, 12, 3), jnp.float32)
        level = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return {"noisy": picture, "low": picture, "noise_level": level}

    def flops(self):
        return 1.0

    def attention_maps(self, captured):
        return {}


@functools.cache
def make(**options):
    task = SuperResolution(Pointwise(), **{"sample_steps": 5} | options)
    return task, task.init(KEY, task.example(1))


def draw(b=3, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.uniform(-1, 1, (b, 12, 12, 3)).astype(np.float32) for n in ("low", "high")}


def test_it_is_a_task():
    task, params = make()
    assert isinstance(task, Task) and task.inputs == ("low", "high") and task.flops == 3
    assert {n: x.shape for n, x in task.example(2).items()} == {
        "low": (2, 12, 12, 3), "high": (2, 12, 12, 3),
    }  # fmt: skip
    assert params["weight"].shape == (3,)
    assert len(task.levels) == 2_001 and len(task.sample_levels) == 6
    assert len(SuperResolution(Pointwise()).sample_levels) == 2_001


def test_loss_by_hand():
    """Half of what the model says is dropped, so that an error is that of nothing or of twice."""
    task, params = make()
    batch, key = draw(), jax.random.key(3)
    run = jax.jit(task.loss, compiler_options=QUICK)
    loss, values = run(params, batch, key, 0)
    assert values == {"noise_error": loss} and loss.dtype == jnp.float32
    level_key, noise_key, _, _ = jax.random.split(key, 4)
    level = np.asarray(diffusion.sample_levels(level_key, task.levels, 3), np.float64)
    level = level[:, None, None, None]
    noise = np.asarray(jax.random.normal(noise_key, batch["high"].shape), np.float64)
    seen = level * batch["high"] + np.sqrt(1 - level**2) * noise + batch["low"] + level
    either = [np.abs(noise), np.abs(noise - 2 * seen)]
    spread = np.std(either, axis=0) / np.sqrt(noise.size)
    assert abs(float(loss) - np.mean(either)) < 4 * np.sqrt(np.mean(spread**2))
    without = task._errors(params, batch, jnp.float32(noise), jnp.float32(level[:, 0, 0, 0]))
    np.testing.assert_allclose(without, np.abs(noise - seen).mean((1, 2, 3)), rtol=TOLERANCE)
    assert float(run(params, batch, jax.random.key(4), 0)[0]) != float(loss)


def test_samples_depend_on_their_picture_and_the_seed():
    task, params = make()
    batch = draw()
    run = jax.jit(task.predict, compiler_options=QUICK)
    out = np.asarray(run(params, batch)["prediction"])
    assert out.shape == (3, 12, 12, 3) and np.abs(out).max() <= 1
    np.testing.assert_array_equal(run(params, batch)["prediction"], out)
    turned = {name: x[::-1] for name, x in batch.items()}
    np.testing.assert_allclose(run(params, turned)["prediction"][::-1], out, atol=TOLERANCE)
    beside = {name: np.concatenate([batch[name][:1], x[1:]]) for name, x in draw(seed=1).items()}
    np.testing.assert_allclose(run(params, beside)["prediction"][:1], out[:1], atol=TOLERANCE)
    # A picture whose pixels are in another order gets other noise.
    keys = jax.vmap(jax.random.key_data)(task._keys(batch["low"]))
    mirrored = jax.vmap(jax.random.key_data)(task._keys(batch["low"][:, ::-1]))
    assert len({tuple(map(int, k)) for k in (*keys, *mirrored)}) == 6
    other, _ = make(seed=1)
    others = jax.vmap(jax.random.key_data)(other._keys(batch["low"]))
    assert not (np.asarray(others) == np.asarray(keys)).all(axis=1).any()


def test_metrics_of_a_batch():
    task, params = make()
    batch = draw() | {"valid": np.array([True, True, False])}
    run = jax.jit(lambda *x: (task.evaluate(*x), task.predict(*x)), compiler_options=QUICK)
    states, answers = run(params, batch)
    values = metrics.compute(states)
    assert set(values) == {"loss", "psnr", "ssim", "low_psnr", "low_ssim"}
    made = to_uint8(answers["prediction"])[:2]
    target, low = to_uint8(batch["high"])[:2], to_uint8(batch["low"])[:2]
    for prefix, ours in (("", made), ("low_", low)):
        expected = np.mean(psnr(ours, target)), np.mean(ssim(ours, target))
        found = values[f"{prefix}psnr"], values[f"{prefix}ssim"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    parts = [run(params, batch | {"valid": np.arange(3) == i})[0] for i in (0, 1)]
    merged = metrics.compute(metrics.merge(*parts))
    for name, value in values.items():
        assert merged[name] == pytest.approx(value, rel=1e-5), name


def test_two_steps_through_the_trainer(tmp_path, quick):
    """Folders of pictures, local attention between their pixels, evaluation by samples."""
    rng = np.random.default_rng(0)
    for i in range(8):
        for folder, side in (("hr_8", 8), ("lr_2", 2), ("sr_2_8", 8)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{i}.png")
    run = recipe.load("configs/cab/sr3_faces.py:local")
    source = {"root": str(tmp_path / "data"), "small": 2, "large": 8}
    run.steps, run.batch, run.data.workers = 2, 8, 0
    run.data.source |= source
    run.evals["val"].data.source |= source
    run.model |= {"image_size": 8, "width": 4, "multipliers": (1,), "depth": 1, "groups": 2,
                  "attention_sides": ()}  # fmt: skip
    run.task |= {"sample_steps": 2, "ssim_window": 7}
    run.report.tensorboard = False
    result = loop.run(run, tmp_path / "run")
    assert result.step == 2 and {f"val/{n}" for n in ("psnr", "ssim", "loss")} <= set(
        result.metrics
    )
    assert all(np.isfinite(x) for x in result.metrics.values())


def test_refusals():
    for options, message in (
        ({"schedule": "quadratic"}, "unknown schedule"),
        ({"steps": 0}, "steps=0"),
        ({"sample_steps": 3_000}, "steps=3000: must be in 1 to 2000"),
        ({"sample_steps": -1}, "steps=-1"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"last_beta": 1.0}, "last=1.0"),
        (
            {"ssim_window": 13},
            "task.ssim_window=13: must be odd and at most the picture's side, 12",
        ),
        ({"ssim_window": 4}, "task.ssim_window=4"),
    ):
        with pytest.raises(RecipeError, match=message):
            SuperResolution(Pointwise(), **options)
    with pytest.raises(RecipeError, match="needs a model of noisy, low, noise_level"):
        SuperResolution(build("sequence_mixer", vocab=5))
    task, _ = make()
    task.check(draw())
    for change, message in (
        (lambda b: b.pop("high"), "the data has no high"),
        (lambda b: b.update(low=b["low"][:, :8]), r"'low' is float32\[3, 8, 12, 3\]"),
        (lambda b: b.update(low=b["low"].astype(np.float64)), "'low' is float64"),
        (lambda b: b.update(high=b["high"] * 127), "'high' of row 0 holds 12.*in \\[-1, 1\\]"),
        (lambda b: b["high"].__setitem__((1, 0, 0, 0), np.nan), "'high' of row 1 holds nan"),
    ):
        batch = draw()
        change(batch)
        with pytest.raises(RecipeError, match=message):
            task.check(batch)


def one_step(sizes, devices):
    """Loss, gradient norm and metrics of one step of the small recipe."""
    run = recipe.load("configs/cab/sr3_digits.py")
    run.batch, run.mesh = 8, Mesh(**sizes)
    run.model |= {"width": 16}
    run.task |= {"sample_steps": 3}
    mesh = make_mesh(dataclasses.asdict(run.mesh), jax.devices()[:devices])
    program = build_program(run.validate(), mesh)
    rng = np.random.default_rng(0)
    shape = program.batch["low"].shape
    batch = {n: rng.uniform(-1, 1, shape).astype(np.float32) for n in ("low", "high")}
    with jax.set_mesh(mesh):
        state, values = program.step(program.init(), program.to_device(batch))
        scores = metrics.compute(program.evaluate(state.params, program.to_device(batch)))
    return {k: float(values[k]) for k in ("loss", "grad_norm")} | scores


@pytest.mark.slow
def test_step_and_metrics_on_eight_devices():
    alone = one_step({"data": 1}, 1)
    for sizes in ({"data": 2, "fsdp": 2, "model": 2}, {"data": 2, "context": 4}):
        shared = one_step(sizes, 8)
        for name, value in alone.items():
            assert shared[name] == pytest.approx(value, rel=1e-4), (sizes, name)


@pytest.mark.slow
def test_recipe_reaches_what_it_says(tmp_path):
    """Digits, 4 x 4 to 8 x 8: far closer to the original than the bicubic filter."""
    result = loop.run(recipe.load("configs/cab/sr3_digits.py"), tmp_path)
    assert result.metrics["test/psnr"] > 17 and result.metrics["test/ssim"] > 0.85
    assert result.metrics["test/low_psnr"] < 13.2 and result.metrics["test/low_ssim"] < 0.58
