# SPDX-License-Identifier: Apache-2.0
"""How launchers end: one line for what a user can act on, a traceback for what is our mistake."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

JOIN = """
import socket
import jax
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
"""


def run(body, join=False):
    code = "from attnjax.errors import Diverged\nfrom launch import command\n"
    code += (JOIN if join else "") + f"def main():\n    {body}\ncommand.run(main)\n"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("join", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("return 6", 6, None),
        ("raise Diverged('too\\n  bad')", 5, "error: too bad"),
        ("return 1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_end(body, code, last, join):
    start = time.monotonic()
    done = run(body, join)
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert (lines[-1] if lines else None) == last
    assert ("Traceback" in done.stderr) == ("/" in body)
    assert time.monotonic() - start < 30


def test_failed_writes_of_a_lost_save_are_not_shown():
    body = """
    class Left:
        def __init__(self, text):
            self.text = text
        def __del__(self):
            raise RuntimeError(self.text)
    Left("Event loop is closed")
    Left("something else")
"""
    done = run(body)
    assert done.returncode == 0
    assert "something else" in done.stderr and "Event loop" not in done.stderr
