# SPDX-License-Identifier: Apache-2.0
"""The loop end to end on a tiny CrossViT: meshes agree, interruptions leave no trace."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from attnjax.errors import Preempted, RecipeError
from attnjax.parallel import make_mesh
from attnjax.recipe import Checkpoint, Data, Evaluation, Mesh, Optim, Recipe, Report
from attnjax.train.loop import run
from attnjax.train.program import build

MESH_TOLERANCE = 1e-5  # float32: the order of sums differs between meshes


def tiny(**changes) -> Recipe:
    source = {"name": "information_exchange", "seed": 3}
    recipe = Recipe(
        seed=1,
        steps=8,
        batch=16,
        model={
            "name": "crossvit",
            "num_classes": 2,
            "image_size": (16, 16),
            "patch_size": (4, 8),
            "dims": (16, 32),
            "depth": ((1, 1, 0),),
            "num_heads": (4, 4),
            "mlp_ratio": (2.0, 2.0),
            "stem": "patches",
            "drop_path": 0.2,
        },
        task={"name": "classification"},
        data=Data(source=source),
        optim=Optim(lr=1e-3, ema=0.9, accumulate=2),
        mesh=Mesh(data=1),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 40}))},
        checkpoint=Checkpoint(every=4),
        report=Report(every=2, tensorboard=False, samples=0),
    )
    return dataclasses.replace(recipe, **changes)


def show_one_device(monkeypatch):
    """Let the loop see a single device: compiling for eight takes longer and adds nothing here."""
    first = lambda sizes: make_mesh(sizes, jax.devices()[:1])
    monkeypatch.setattr("attnjax.train.loop.make_mesh", first)


@pytest.fixture
def one_device(monkeypatch):
    show_one_device(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted: its result and its folder."""
    workdir = tmp_path_factory.mktemp("loop") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        show_one_device(monkeypatch)
        return run(tiny(), workdir), workdir


def losses(sizes, devices, steps=20):
    """Train on fixed batches over a mesh and return the losses."""
    recipe = tiny(steps=steps, mesh=Mesh(**sizes))
    mesh = make_mesh(sizes, jax.devices()[:devices])
    program = build(recipe, mesh)
    rng = np.random.default_rng(0)
    values = []
    with jax.set_mesh(mesh):
        state = program.init()
        for _ in range(steps):
            batch = {
                name: rng.normal(size=x.shape).astype(np.float32)
                for name, x in program.batch.items()
                if name != "label"
            }
            batch["label"] = rng.integers(0, 2, recipe.batch).astype(np.int32)
            state, metrics = program.step(state, program.to_device(batch))
            values.append(float(metrics["loss"]))
    return values


@pytest.fixture(scope="module")
def single():
    return losses({"data": 1}, 1)


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [
        ({"data": 2, "fsdp": 2, "model": 2}, 8),
        pytest.param({"data": 8}, 8, marks=pytest.mark.slow),
        pytest.param({"data": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"data": 4}, 4, marks=pytest.mark.slow),
        pytest.param({"data": 1, "fsdp": 8}, 8, marks=pytest.mark.slow),
        pytest.param({"data": 1, "model": 4}, 4, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "context": 2}, 8, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_computes_the_same_losses(single, sizes, devices):
    np.testing.assert_allclose(losses(sizes, devices), single, atol=MESH_TOLERANCE)


def test_run_leaves_everything(whole, one_device):
    result, workdir = whole
    assert result.step == 8
    assert set(result.metrics) == {"test/accuracy", "test/loss"}
    names = {path.name for path in workdir.iterdir()}
    assert {"recipe.json", "environment.json", "metrics.jsonl", "checkpoints", "report"} <= names
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == [2, 4, 6, 8]
    assert "test/accuracy" in (workdir / "report" / "report.md").read_text()
    assert Recipe.from_json((workdir / "recipe.json").read_text()).identity() == tiny().identity()
    # Another recipe is refused without touching the folder; a finished run runs no step.
    with pytest.raises(RecipeError, match=r"belongs to another recipe.*seed: 1 != 2"):
        run(tiny(seed=2), workdir)
    with pytest.raises(RecipeError, match="already holds a run"):
        run(tiny(), workdir, resume="never")
    again = run(tiny(), workdir, on_step=lambda step, rows: pytest.fail("took a step"))
    assert again.metrics == result.metrics


def test_interrupted_run_is_bit_identical(whole, tmp_path, one_device):
    """Dropout, accumulation and the moving average included; losses are logged once each."""
    result, workdir = whole

    def interrupt(step, rows):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted, match="after step 5"):
        run(tiny(), tmp_path, on_step=interrupt)
    resumed = run(tiny(), tmp_path)
    for a, b in zip(
        jax.tree.leaves((result.state.params, result.state.opt_state, result.state.ema)),
        jax.tree.leaves((resumed.state.params, resumed.state.opt_state, resumed.state.ema)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    read = lambda folder: (folder / "metrics.jsonl").read_text()
    assert read(tmp_path) == read(workdir)


def test_dry_run_writes_nothing(tmp_path, one_device, capsys):
    run(tiny(), tmp_path / "none", dry_run=True)
    assert not (tmp_path / "none").exists()
    printed = capsys.readouterr().out
    assert "bytes/device" in printed
    assert "fine_0_0/attention/query/kernel" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 17, "optim": Optim(accumulate=1)}, r"batch=17"),
        ({"model": {**tiny().model, "image_size": (32, 32)}}, "fine"),
        ({"model": {**tiny().model, "num_heads": (3, 4)}}, "does not divide"),
        ({"model": {**tiny().model, "num_classes": 1}}, "label 1"),
        ({"mesh": Mesh(data=3)}, "does not divide"),
    ],
)
def test_bad_recipes_stop_before_anything_is_written(tmp_path, changes, message):
    changes = {"mesh": Mesh(data=-1), **changes}
    with pytest.raises(RecipeError, match=message):
        run(tiny(**changes), tmp_path / "none")
    assert not (tmp_path / "none").exists()
