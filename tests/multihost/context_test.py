# SPDX-License-Identifier: Apache-2.0
"""Two real processes of four devices share a sequence, by ring and by Ulysses."""

import pathlib
import socket
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("context_worker.py")


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_share_a_sequence():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, address, str(index)],
            cwd=WORKER.parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        assert output.splitlines()[-2:] == ["ring: equal", "ulysses: equal"]
