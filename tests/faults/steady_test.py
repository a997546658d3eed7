# SPDX-License-Identifier: Apache-2.0
"""Fault 25: a thousand smoke steps compile once, keep their memory and warn of nothing."""

import json
import os
import pathlib

import pytest

GROWTH = 16 << 20
"""Bytes that resident memory may grow by in the last 700 steps."""


def resident(pid: int) -> int:
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_thousand_steps(start, tmp_path):
    run = start(
        tmp_path,
        "--config.steps=1000",
        "--config.checkpoint.every=50",
        "--config.evals.test.every=100",
        config="configs/crossvit/smoke.py",
        JAX_LOG_COMPILES="1",
        PYTHONWARNINGS="always",
        # Every thread of the C library otherwise fills a heap of its own before memory is flat.
        MALLOC_ARENA_MAX="2",
    )
    memory = {}
    for step in range(100, 1_000, 100):
        run.wait_for(lambda: run.steps() >= step)
        memory[step] = resident(run.process.pid)
    assert run.finish() == 0, run.errors[-3000:]
    print({step: f"{size / 2**20:.0f} MiB" for step, size in memory.items()})
    compiled = [line for line in run.errors.splitlines() if "Compiling jit(" in line]
    for name in ("step", "evaluate"):
        assert sum(f"jit({name})" in line for line in compiled) == 1, name
    assert max(memory.values()) - memory[300] < GROWTH
    assert "Warning" not in run.errors
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 1_000 and records[-1]["test/accuracy"] > 0.5
