# SPDX-License-Identifier: Apache-2.0
"""launch.analyze and launch.generate: from a run to a report and to text."""

import json

import pytest

ANALYZE = ("analyze", "--system=icl_linear_regression")


def test_circuits_of_a_run_by_command(launch, tmp_path):
    config = "configs/icl_linear_regression/smoke.py"
    run = tmp_path / "run"
    small = ("--config.steps=4", "--config.evals.test.data.source.size=8")
    done = launch("train", f"--config={config}", f"--workdir={run}", *small)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    done = launch(*ANALYZE, "--measure=circuits", f"--workdir={run}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "| diagonal_ratio |" in done.stdout
    heads = json.loads((out / "circuits.json").read_text())["tables"]["heads"]
    assert heads["replica"] == [0, 0, 1, 1] and (out / "circuits-kq.png").stat().st_size > 1000
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("train/omega_1_0" in record for record in metrics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze", "--system=cab"), "known: icl_linear_regression"),
        ((*ANALYZE, "--measure=circuit"), "did you mean 'circuits'"),
        ((*ANALYZE, "--measure=theory"), "--out is missing"),
        ((*ANALYZE, "--measure=theory", "--set=head=2"), "did you mean 'heads'"),
        ((*ANALYZE, "--measure=theory", "--set=heads"), "expected name=value"),
        ((*ANALYZE, "--measure=circuits"), "--workdir is missing"),
        (("generate",), "--prompt is missing"),
        (("generate", "--prompt=a", "--workdir=none"), "recipe.json"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(launch, arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_trained_decoder_writes_and_is_evaluated(launch, tmp_path):
    config, run = "configs/decoder_lm/smoke.py", tmp_path / "run"
    small = (
        "--config.steps=2", "--config.optim.warmup=1", "--config.batch=2",
        "--config.model.depth=1", "--config.model.width=32",
        "--config.model.hidden=32", "--config.evals.test.data.source.name=stdlib_text",
        "--config.data.source.name=stdlib_text", "--config.evals.test.batch=32",
    )  # fmt: skip
    done = launch("train", f"--config={config}", f"--workdir={run}", *small)
    assert done.returncode == 0, done.stderr
    prompts = ("--prompt=def f(", "--prompt=import")
    done = launch("generate", f"--workdir={run}", *prompts, "--tokens=8", "--temperature=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(") and "\n\nimport" in done.stdout
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"context": "a", "choices": ["b", "c"], "gold": 0}) + "\n")
    done = launch("evaluate", f"--workdir={run}", "--ngram=2", f"--choices={questions}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 3.0 < found["test/ngram_bits_per_token"] < 4.0 < found["test/bits_per_byte"]
    assert found["choices/chance"] == 0.5 and found["choices/accuracy"] in (0, 1)
