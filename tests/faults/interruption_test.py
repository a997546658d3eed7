# SPDX-License-Identifier: Apache-2.0
"""Faults 1, 7 and 14: a run of the real launcher, interrupted, ends as if nothing had happened."""

import re
import resource
import signal
import time

import numpy as np
import pytest

SMALL = 20_000
"""Bytes: enough for recipe.json and metrics.jsonl, not for the arrays of a checkpoint."""

LIFE = 5.0
"""Seconds: about what a run takes once its programs are compiled; kills fall anywhere in it."""


def kill_and_restart(start, workdir, rng, kills):
    """Kill a run at random moments of its life, then let it finish; return how many were alive."""
    killed = 0
    for _ in range(kills):
        run = start(workdir)
        time.sleep(rng.uniform(0.3, 1.0) * LIFE)
        run.kill()
        assert run.process.returncode in (0, -signal.SIGKILL), run.errors
        killed += run.process.returncode != 0
    run = start(workdir)
    assert run.finish() == 0, run.errors
    return killed


def test_killed_twice(start, reference, left, tmp_path):
    # The first kill falls between two steps that are both saved and logged.
    run = start(tmp_path)
    run.wait_for(lambda: run.steps() >= 5)
    run.kill()
    kill_and_restart(start, tmp_path, np.random.default_rng(0), 1)
    left(tmp_path).assert_same(reference)


@pytest.mark.slow
def test_killed_ten_times(start, reference, left, tmp_path):
    rng = np.random.default_rng(1)
    kills = 0
    for number in range(5):
        workdir = tmp_path / str(number)
        kills += kill_and_restart(start, workdir, rng, 4)
        left(workdir).assert_same(reference)
    print(f"{kills} of 20 kills met a living process")
    assert kills >= 10


def stop_early(start, workdir):
    """Run until SIGTERM stops it, as asserted here; return the step it stopped after."""
    run = start(workdir)
    run.wait_for(lambda: run.steps() >= 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 3, run.errors
    *_, last = run.errors.splitlines()
    step = re.fullmatch(r"error: stopped by a signal after step (\d+); run again to continue", last)
    return int(step[1])


def test_sigterm_then_a_full_disk(start, reference, left, tmp_path):
    step = stop_early(start, tmp_path)
    stopped = left(tmp_path)
    assert stopped.step == step < reference.step
    assert stopped.metrics == reference.metrics[:step]

    run = start(tmp_path)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (SMALL, SMALL))
    assert run.finish() == 1, run.errors
    *_, last = run.errors.splitlines()
    assert last.startswith(f"error: cannot write checkpoints to {tmp_path}/checkpoints: "), last
    assert "File too large" in last and "Traceback" not in run.errors
    spared = left(tmp_path)
    assert spared.step == step
    spared.metrics = stopped.metrics  # Lines beyond the checkpoint are cut by the next start.
    spared.assert_same(stopped)

    run = start(tmp_path)
    assert run.finish() == 0, run.errors
    assert f"continuing from step {step}\n" in run.errors
    left(tmp_path).assert_same(reference)


@pytest.mark.slow
def test_sigterm_before_the_first_step(start, left, tmp_path):
    """While it compiles, a run answers as it does later: after its first step."""
    run = start(tmp_path)
    run.wait_for(lambda: "26,148 parameters" in run.errors)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 3, run.errors
    assert left(tmp_path).step == 1
