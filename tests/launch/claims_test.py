# SPDX-License-Identifier: Apache-2.0
"""launch.claims refuses early, records what it measured, and says so with its exit code."""

import dataclasses
import json
import shutil
import types

import pytest

from attnjax import claim as claim_lib
from attnjax import recipe as recipe_lib
from attnjax.claim import Arm, Claim, Condition
from attnjax.errors import Diverged
from attnjax.train import claim as measurement


def tiny_claim(threshold):
    overrides = {"steps": 2, "batch": 8, "optim.warmup": 0, "report.samples": 0}
    arm = Arm("configs/crossvit/smoke.py", "test/accuracy", overrides)
    return Claim(
        statement="two steps are enough",
        baseline="chance",
        arms={"two": arm, "again": dataclasses.replace(arm, overrides={**overrides, "batch": 16})},
        conditions=(Condition("two", ">=", threshold),),
        effect="two - again",
        seeds=2,
    )


@pytest.fixture
def fake_runs(monkeypatch):
    """Replace training by a table of accuracies: one entry per run, in order."""
    accuracies = []

    def run(recipe, workdir):
        assert not workdir.exists()
        value = accuracies.pop(0)
        if value is None:
            raise Diverged("planted")
        return types.SimpleNamespace(metrics={"test/accuracy": value})

    monkeypatch.setattr(measurement, "run", run)
    monkeypatch.setattr(claim_lib, "load", lambda slug: tiny_claim(0.9))
    return accuracies


def test_record_has_every_field(fake_runs):
    fake_runs += [0.95, 0.5, 1.0, 0.5]
    lines = []
    record = measurement.measure("crossvit", command="the command", say=lines.append)
    assert record["per_seed"] == {"two": [0.95, 1.0], "again": [0.5, 0.5]}
    assert record["effect"] == pytest.approx(0.475)
    assert record["holds"] is True
    assert (record["seeds"], record["command"]) == ([0, 1], "the command")
    assert {"attnjax", "jax", "python"} <= set(record["versions"])
    assert len(lines) == 4
    json.loads(json.dumps(record, allow_nan=False))


def test_arms_of_one_recipe_share_its_run(fake_runs, monkeypatch):
    claim = tiny_claim(0.9)
    claim = dataclasses.replace(claim, arms={**claim.arms, "same": claim.arms["two"]})
    monkeypatch.setattr(claim_lib, "load", lambda slug: claim)
    fake_runs += [0.95, 0.5]
    record = measurement.measure("crossvit", seeds=1)
    assert record["per_seed"] == {"two": [0.95], "again": [0.5], "same": [0.95]}
    assert not fake_runs


def test_diverged_run_is_recorded_as_null(fake_runs):
    fake_runs += [None, 0.5]
    record = measurement.measure("crossvit", seeds=1)
    assert record["per_seed"]["two"] == [None]
    assert record["holds"] is False
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--system is missing; claims: cab, crossvit, "),
        (("--system=crossvitt",), "did you mean 'crossvit'"),
        (("--system=crossvit", "--seeds=-1"), "--seeds=-1"),
        (("--system=crossvit", "--out=/proc/none/results.jsonl"), "cannot be written"),
    ],
)
def test_refusals_take_one_line_and_exit_2(launch, arguments, message):
    done = launch("claims", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("threshold", "code"), [pytest.param(0.0, 0, marks=pytest.mark.slow), (1.01, 6)]
)
def test_whole_command(launch, tmp_path, threshold, code):
    """A clone with another claim: the real command, training included."""
    configs = tmp_path / "configs"
    shutil.copytree(recipe_lib.folder(), configs)
    shutil.copytree(recipe_lib.folder().parent / "attnjax", tmp_path / "attnjax")
    shutil.copytree(recipe_lib.folder().parent / "launch", tmp_path / "launch")
    (configs / "results.jsonl").unlink(missing_ok=True)
    (configs / "crossvit/claim.py").write_text(
        "from attnjax.claim import Arm, Claim, Condition\n"
        "def get_claim():\n"
        "    changes = {'steps': 2, 'batch': 8, 'optim.warmup': 0, 'report.samples': 0}\n"
        "    arm = Arm('configs/crossvit/smoke.py', 'test/accuracy', changes)\n"
        f"    bounds = (Condition('two', '>=', {threshold}),)\n"
        "    return Claim('s', 'b', {'two': arm}, bounds, 'two', seeds=1)\n"
    )
    done = launch("claims", "--system=crossvit", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == code, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["holds"] is (code == 0)
    assert json.loads((configs / "results.jsonl").read_text()) == record
    assert "seed 0 two: test/accuracy" in done.stderr
