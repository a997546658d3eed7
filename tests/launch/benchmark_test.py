# SPDX-License-Identifier: Apache-2.0
"""launch.benchmark measures what it says and refuses early."""

import json
import tempfile

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "known: "),
        (("--suite=trainin",), "did you mean 'training'"),
        (("--suite=training",), "--config is missing"),
        (("--suite=attention",), "--out is missing"),
        (("--suite=attention", "--only=nobody"), "matches no cell"),
        (("--suite=attention", "--shapes=hug"), "choose from"),
        (("--suite=cab", "--shapes=quik"), "choose from"),
        (("--suite=cab", "--shapes=quick", "--only=nobody"), "matches no cell"),
        (("--suite=long_context", "--shapes=hug"), "choose from"),
        (("--suite=long_context", "--tune"), "suite long_context has no tiles"),
        (("--suite=long_context", "--shapes=quick:none.csv"), "cannot be read"),
        (("--suite=mixers",), "--out is missing"),
        (("--suite=mixers", "--only=nobody"), "matches no cell"),
        (("--suite=mixers", "--tune"), "suite mixers has no tiles"),
        (
            (
                "--suite=mixers",
                "--config=configs/unified_long_sequence/needle.py",
                "--shapes=quik",
                f"--out={tempfile.gettempdir()}",
            ),
            "did you mean 'quick'",
        ),
        (
            ("--suite=training", "--config=configs/crossvit/smoke.py", "--out=/proc/none/x"),
            "cannot be written",
        ),
        (
            ("--suite=training", "--config=configs/crossvit/smoke.py", "--peer=tim"),
            "did you mean 'timm'",
        ),
    ],
)
def test_refusals_take_one_line_and_exit_2(launch, arguments, message):
    done = launch("benchmark", *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert message in line


def test_training_suite(launch, tmp_path):
    out = tmp_path / "speed.jsonl"
    config = ("--config=tests/faults/tiny.py", "--config.optim.accumulate=1")
    done = launch("benchmark", "--suite=training", *config, "--seconds=0.1", f"--out={out}")
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["parameters"] > 0 and record["batch"] == 16
    for name in ("forward", "step"):
        ours = record[name]["ours"]
        assert ours["low"] <= ours["median"] <= ours["high"]
        assert ours["examples_per_second"] == pytest.approx(16 / ours["median"])
    consumed = record["step"]["ours"]["examples_per_second"]
    made = record["data"]["examples_per_second"]
    assert record["data_ratio"] == pytest.approx(made / consumed)
    assert "what the step consumes" in done.stdout


def test_dry_run_lists_the_cells(launch):
    done = launch("benchmark", "--suite=attention", "--dry_run", "--only=^chunked/full/.*/forward")
    assert done.returncode == 0, done.stderr
    assert "chunked/full/bfloat16/1x2048x8x8x64/forward" in done.stdout.splitlines()


def test_long_context_suite(launch, tmp_path):
    arguments = ("--suite=long_context", "--shapes=quick", "--only=(chunked|cudnn)@1/causal/")
    done = launch("benchmark", *arguments, "--dry_run")
    assert done.returncode == 0, done.stderr
    cells = [
        "chunked@1/causal/float32/256x8x2x32/both/0",
        "cudnn@1/causal/float32/256x8x2x32/both/0",
    ]
    assert done.stdout.splitlines() == cells
    for _ in range(2):
        done = launch("benchmark", *arguments, f"--out={tmp_path}", "--seconds=0.1")
        assert done.returncode == 0, done.stderr
        assert "refused: cudnn: dtype float32 not supported" in done.stdout
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
    (table,) = (tmp_path / "summary").iterdir()
    header, chunked, cudnn = table.read_text().splitlines()
    assert header == "baseline,masktype,world_size,wd,ulysses,ring,mean_tflops,mean_peak_mems"
    assert chunked.startswith("chunked,causal,1,1f1b,1,1,0.") and cudnn.endswith(",-1,-1")
    assert (tmp_path / "speed_both.png").exists()


def test_mixers_suite(launch, tmp_path):
    only = "--only=^(fnet|window)/256/forward"
    done = launch("benchmark", "--suite=mixers", "--shapes=quick", only, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "fnet forward" in done.stdout and "window/256/forward: " in done.stderr
    assert (tmp_path / "results.png").stat().st_size > 0
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
