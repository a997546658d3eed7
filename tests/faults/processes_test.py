# SPDX-License-Identifier: Apache-2.0
"""Faults 8, 10, 21 and 22: one of two real processes is stopped, fails, hangs or disagrees."""

import json
import re
import signal
import socket
import time

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multihost]

LOSS_TOLERANCE = 1e-6
"""Relative; float32, where only the order of sums differs between process counts."""

HANG_TIMEOUT = 15.0
FAULTY = {"module": "tests.faults.faulty", "config": "tests/faults/tiny.py:faulty"}


def fault(name, process, after=0):
    values = {"fault": name, "process": process, "after": after}
    return [f"--config.data.source.{key}={value}" for key, value in values.items()]


@pytest.fixture
def start_two(start):
    """Return a function (workdir, *flags, own=(flags of 0, flags of 1)) -> two processes."""

    def launch(workdir, *flags, own=((), ()), variables=({}, {})):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        shared = ["--cpu_devices=2", f"--coordinator={address}", "--process_count=2", *flags]
        return [
            start(workdir, *shared, f"--process_id={i}", *own[i], **FAULTY, **variables[i])
            for i in range(2)
        ]

    return launch


def noted(*files):
    """Join the example ids of processes: step -> ids of the global batch."""
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    joined = {}
    for rows in zip(*parts, strict=True):
        assert len({row["step"] for row in rows}) == 1
        joined[rows[0]["step"]] = [index for row in rows for index in row["ids"]]
    return joined


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], [line["train/loss"] for line in lines]


@pytest.mark.parametrize("signalled", [0, 1])
def test_sigterm_to_one_stops_both_and_one_continues(start, start_two, tmp_path, signalled):
    whole = start(tmp_path / "whole", "--cpu_devices=4", FAULTY_IDS=str(tmp_path / "w"), **FAULTY)
    assert whole.finish() == 0, whole.errors
    workdir, files = tmp_path / "parts", [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
    both = start_two(workdir, variables=[{"FAULTY_IDS": str(file)} for file in files[:2]])
    both[0].wait_for(lambda: both[0].steps() >= 2)
    both[signalled].process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert [run.finish(30) for run in both] == [3, 3], both[0].errors + both[1].errors
    print(f"both ended {time.monotonic() - begin:.1f} s after SIGTERM")
    ends = [re.search(r"after step (\d+)", run.errors)[1] for run in both]
    assert ends[0] == ends[1]
    step = int(ends[0])
    complete = [f.parent.name for f in (workdir / "checkpoints").glob("*/commit_success.txt")]
    assert max(map(int, complete)) == step < 12

    one = start(workdir, "--cpu_devices=4", FAULTY_IDS=str(files[2]), **FAULTY)
    assert one.finish() == 0, one.errors
    assert f"continuing from step {step}\n" in one.errors
    assert noted(*files[:2]) | noted(files[2]) == noted(tmp_path / "w")
    (steps, values), (all_steps, expected) = losses(workdir), losses(tmp_path / "whole")
    assert steps == all_steps == list(range(1, 13))
    np.testing.assert_allclose(values, expected, rtol=LOSS_TOLERANCE)


@pytest.mark.parametrize("process", [0, 1])
def test_one_raises(start_two, tmp_path, process):
    flags = [*fault("raise", process, after=40), f"--hang_timeout={HANG_TIMEOUT}"]
    both = start_two(tmp_path / "run", *flags)
    begin = time.monotonic()
    codes = [run.finish(120) for run in both]
    print(f"codes {codes}, {time.monotonic() - begin:.1f} s after the start")
    assert codes[process] == 1 and codes[1 - process] != 0
    assert "planted fault" in both[process].errors


@pytest.mark.parametrize("process", [0, 1])
def test_one_hangs(start_two, tmp_path, process):
    flags = [*fault("hang", process, after=40), f"--hang_timeout={HANG_TIMEOUT}"]
    both = start_two(tmp_path / "run", *flags)
    begin = time.monotonic()
    codes = [run.finish(120) for run in both]
    print(f"codes {codes}, {time.monotonic() - begin:.1f} s after the start")
    assert 0 not in codes
    assert f"process {process} of 2 completed no step" in both[process].errors
    assert "in hang_for_ever" in both[process].errors


def test_a_loader_that_hangs_at_once(start, tmp_path):
    run = start(tmp_path / "run", *fault("hang", 0), "--hang_timeout=6", **FAULTY)
    assert run.finish(90) == 1
    assert "process 0 of 1 completed no step" in run.errors
    assert "in hang_for_ever" in run.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("own", "variables", "message"),
    [
        (((), ["--config.optim.lr=0.5"]), ({}, {}),
         "recipe.optim.lr: process 0 0.001, process 1 0.5"),
        (((), ["--config.checkpoint.every=3"]), ({}, {}),
         "recipe.checkpoint.every: process 0 2, process 1 3"),
        (((), ()), ({}, {"FAULTY_VERSION": "9.9"}), "attnjax: process 0 .*, process 1 9.9"),
        ((fault("small", 1),) * 2, ({}, {}), "data: process 0 131072, process 1 65536"),
        ((fault("missing", 1),) * 2, ({}, {}), "source.root: no such folder"),
    ],
    ids=["recipe", "checkpoint", "version", "size", "missing"],
)  # fmt: skip
def test_disagreement_is_refused_on_both(start_two, tmp_path, own, variables, message):
    both = start_two(tmp_path / "run", own=own, variables=variables)
    for run in both:
        assert run.finish(60) == 2, run.errors
        assert re.search(rf"^error: .*{message}", run.errors, re.MULTILINE), run.errors
        assert "Traceback" not in run.errors
    assert not (tmp_path / "run").exists()
