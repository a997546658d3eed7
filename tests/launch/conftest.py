# SPDX-License-Identifier: Apache-2.0
"""Runs launchers as users do: in a fresh process, from the root of the clone."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def launch():
    """Return a function (module, *arguments) -> finished process with text output."""

    def run(module, *arguments, cwd=ROOT, **environment):
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(
            [sys.executable, "-m", f"launch.{module}", *map(str, arguments)],
            cwd=cwd,
            env=variables,
            capture_output=True,
            text=True,
        )

    return run
