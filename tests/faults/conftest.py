# SPDX-License-Identifier: Apache-2.0
"""Starts the real launchers in processes of their own, and reads what they leave behind."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from attnjax import recipe as recipe_lib
from attnjax import registry
from attnjax.parallel import make_mesh
from attnjax.train.checkpoint import Checkpointer
from attnjax.train.integrity import flatten, is_key
from attnjax.train.program import build

ROOT = pathlib.Path(__file__).parents[2]
TINY = "tests/faults/tiny.py"
PATIENCE = 180
"""Seconds that a process may take before a test gives up; a loaded machine is slow."""


class Launched:
    """A launcher that runs in a process of its own."""

    def __init__(self, command, environment, log: pathlib.Path):
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
            )

    @property
    def errors(self) -> str:
        """What the process has written to stderr so far."""
        return self.log.read_text(errors="replace")

    def steps(self) -> int:
        """Return the number of the last step in the log."""
        return max(map(int, re.findall(r"  step (\d+)/", self.errors)), default=0)

    def wait_for(self, condition) -> None:
        """Wait until `condition()` holds; the process must be alive until then."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.errors[-3000:]
            assert time.monotonic() < deadline, self.errors[-3000:]
            time.sleep(0.01)

    def finish(self, timeout: float = PATIENCE) -> int:
        """Wait for the end and return the exit code."""
        try:
            self.output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s: {self.errors}") from None
        return self.process.returncode

    def kill(self) -> None:
        """End the process with SIGKILL if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        if not self.process.stdout.closed:
            self.process.communicate()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Variables that make all processes of the session share compiled programs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="session")
def start(compiled, tmp_path_factory):
    """Return a function (workdir, *flags) -> `Launched`."""
    logs = tmp_path_factory.mktemp("stderr")
    numbers = itertools.count()

    def launch(workdir, *flags, module="launch.train", config=TINY, **variables):
        command = [sys.executable, "-m", module]
        command += [f"--workdir={workdir}"] if workdir else []
        command += [f"--config={config}"] if config else []
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **compiled, **variables}
        log = logs / f"{next(numbers)}.txt"
        launched.append(Launched([*command, *map(str, flags)], environment, log))
        return launched[-1]

    launched: list[Launched] = []
    yield launch
    for run in launched:
        run.kill()


@pytest.fixture(scope="session")
def program():
    """The tiny recipe bound to one device, as a process of its own sees it."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return build(recipe_lib.load(TINY).validate(), mesh)


class Left:
    """What a run left in its directory: `state` (leaves by path), `step` and `metrics` (lines)."""

    def __init__(self, workdir: pathlib.Path, program):
        with jax.set_mesh(program.mesh):
            state, _, _, self.step = Checkpointer(workdir / "checkpoints", 1, 9).restore(
                program.state
            )
        self.state = {
            path: np.asarray(jax.random.key_data(x) if is_key(x) else x)
            for path, x in flatten(state).items()
        }
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        self.metrics = [json.loads(line) for line in lines]

    def assert_same(self, other: "Left") -> None:
        """Check that two runs agree in every bit and in every line."""
        assert self.step == other.step
        assert self.state.keys() == other.state.keys()
        for path, value in self.state.items():
            np.testing.assert_array_equal(value, other.state[path], err_msg=path)
        assert self.metrics == other.metrics


@pytest.fixture(scope="session")
def left(program):
    """Return a function (workdir) -> `Left`."""
    return lambda workdir: Left(workdir, program)


@pytest.fixture(scope="session")
def finished(start, tmp_path_factory):
    """Directory of an undisturbed run of the tiny recipe; compiles for all that follow."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run = start(workdir)
    assert run.finish() == 0, run.errors
    return workdir


@pytest.fixture(scope="session")
def reference(finished, left):
    """What the undisturbed run leaves."""
    return left(finished)


@pytest.fixture
def linear_recipe(monkeypatch):
    """A recipe of the linear model on one device, with everything that a run can have."""
    target = "tests.faults.linear:Linear"
    system = registry.System("linear", "model", "a linear map", target)
    monkeypatch.setitem(registry.SYSTEMS, "linear", system)
    monkeypatch.setitem(registry.TABLES["model"], "linear", target)
    use_devices(monkeypatch, 1)
    recipe = recipe_lib.load(TINY)
    recipe.model = {"name": "linear"}
    return recipe


def use_devices(monkeypatch, count: int) -> None:
    """Let the loop see some of the devices only."""
    monkeypatch.setattr(
        "attnjax.train.loop.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:count])
    )
