# SPDX-License-Identifier: Apache-2.0
"""Two real processes of four devices compute what one process of eight computes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LOSS_TOLERANCE = 1e-5  # float32; the order of sums across processes differs
ARGUMENTS = [
    "--config=configs/crossvit/smoke.py",
    "--config.steps=6",
    "--config.optim.warmup=1",
    "--config.report.every=1",
    "--config.report.samples=0",
    "--config.report.tensorboard=false",
    "--config.checkpoint.every=3",
]


def start(workdir, *extra, devices):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "launch.train", f"--workdir={workdir}"]
    command += [f"--cpu_devices={devices}", *ARGUMENTS, *extra]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-2000:]


def train_losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r}


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("axes", [(), ("--config.mesh.fsdp=2", "--config.mesh.model=2")])
def test_two_processes_equal_one(tmp_path, axes):
    finish(start(tmp_path / "one", *axes, devices=8))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    finish(
        *(
            start(
                tmp_path / "two",
                *axes,
                f"--coordinator={address}",
                "--process_count=2",
                f"--process_id={i}",
                devices=4,
            )
            for i in range(2)
        )
    )
    one, two = train_losses(tmp_path / "one"), train_losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 7))
    np.testing.assert_allclose(list(two.values()), list(one.values()), atol=LOSS_TOLERANCE)
