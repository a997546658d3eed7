# SPDX-License-Identifier: Apache-2.0
"""launch.evaluate sees what training saw, and falls back as training does (faults 4 and 18)."""

import json
import shutil

import jax
import pytest

from attnjax import recipe as recipe_lib
from attnjax.parallel import make_mesh
from attnjax.train.checkpoint import restore_params
from attnjax.train.evaluate import evaluate, scalars
from attnjax.train.program import build

CONFIG = "tests/faults/tiny.py:evaluated"
CLOSE = 1e-6
"""float32; compiled for another number of virtual devices."""


@pytest.fixture(scope="module")
def trained(start, finished, tmp_path_factory):
    """Directory of a run that evaluates at every save, and its evaluations by step."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    run = start(workdir, config=CONFIG)
    assert run.finish() == 0, run.errors
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return workdir, {r["step"]: r for r in records if "test/loss" in r}


@pytest.fixture
def evaluated(start):
    """Return a function (workdir, *flags) -> (exit code, last line of stdout or stderr)."""

    def launch(workdir, *flags):
        run = start(workdir, *flags, module="launch.evaluate", config=None)
        code = run.finish()
        return code, json.loads(run.output.splitlines()[-1]) if code == 0 else run.errors

    return launch


def spoil(workdir, *steps):
    for step in steps:
        file = workdir / f"checkpoints/{step}/run/metadata"
        file.write_bytes(file.read_bytes()[:-20])


def test_same_numbers_as_in_training(trained, evaluated):
    workdir, records = trained
    assert sorted(records) == [2, 4, 6, 8, 10, 12]
    assert evaluated(workdir) == (0, records[12])


def test_without_the_average(trained, evaluated):
    workdir, records = trained
    code, values = evaluated(workdir, "--averaged=false")
    assert code == 0 and values["step"] == 12
    assert values["test/loss"] != records[12]["test/loss"]
    recipe = recipe_lib.load(CONFIG)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    program = build(recipe, mesh)
    with jax.set_mesh(mesh):
        params, _ = restore_params(workdir / "checkpoints", program.state.params, ("params",))
        expected = scalars(evaluate(program, params, recipe.evals["test"]))
    assert values["test/loss"] == pytest.approx(expected["loss"], rel=CLOSE)
    assert values["test/accuracy"] == expected["accuracy"]


def test_mean_of_the_last(trained, evaluated):
    workdir, records = trained
    code, values = evaluated(workdir, "--last=3")
    assert code == 0 and values["step"] == 12
    assert values["test/loss"] not in [record["test/loss"] for record in records.values()]
    code, errors = evaluated(workdir, "--last=4")
    *_, last = errors.splitlines()
    assert code == 4 and "the mean of 4 checkpoints needs as many" in last


def test_damaged_checkpoints(trained, evaluated, tmp_path):
    workdir, records = trained
    copy = shutil.copytree(workdir, tmp_path / "run")
    spoil(copy, 12)
    assert evaluated(copy) == (0, records[10])
    spoil(copy, 10, 8)
    code, errors = evaluated(copy)
    assert code == 4
    *_, last = errors.splitlines()
    assert last.startswith(f"error: no usable checkpoint in {copy}/checkpoints: step 12: ")
    shutil.rmtree(copy / "checkpoints")
    code, errors = evaluated(copy)
    assert (code, errors) == (4, f"error: no usable checkpoint in {copy}/checkpoints\n")


def test_a_record_that_names_an_import_path_is_refused(trained, evaluated, tmp_path):
    workdir, _ = trained
    text = (workdir / "recipe.json").read_text()
    (tmp_path / "recipe.json").write_text(text.replace('"crossvit"', '"os:system"'))
    code, errors = evaluated(tmp_path)
    (line,) = errors.splitlines()
    assert code == 2 and "unknown model 'os:system'" in line


def test_nothing_to_evaluate(evaluated, tmp_path):
    code, errors = evaluated(tmp_path)
    (line,) = errors.splitlines()
    assert code == 2 and "give --config or a --workdir with recipe.json" in line
    code, errors = evaluated(None, f"--config={CONFIG}")
    (line,) = errors.splitlines()
    assert code == 2 and "give a --workdir or --config.model.weights" in line
