# SPDX-License-Identifier: Apache-2.0
"""What a run writes: metrics across kills and resumes, environment, report and pictures."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from attnjax.errors import AttnjaxError
from attnjax.train import figures, progress, report


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_steps(workdir, steps, resume_step=0, **options):
    writer = report.MetricsWriter(workdir, resume_step, tensorboard=False)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()


def test_one_json_object_per_line(tmp_path):
    writer = report.MetricsWriter(tmp_path, tensorboard=False)
    values = {"a": 1, "b": 0.5, "c": np.float32(2), "d": jnp.float32(3), "e": jnp.bfloat16(4)}
    writer.write(10, values)
    writer.write(20, {"a": float("nan"), "b": float("inf")})
    writer.flush()
    writer.close()
    writer.close()
    assert lines(tmp_path) == [
        {"step": 10, "a": 1, "b": 0.5, "c": 2.0, "d": 3.0, "e": 4.0},
        {"step": 20, "a": None, "b": None},
    ]


def test_arrays_are_refused_by_name(tmp_path):
    writer = report.MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(TypeError, match="confusion"):
        writer.write(1, {"val/confusion": np.eye(2)})
    writer.close()
    assert lines(tmp_path) == []


def test_resume_equals_a_run_without_interruption(tmp_path):
    write_steps(tmp_path / "reference", range(1, 21))
    workdir = tmp_path / "killed"
    write_steps(workdir, range(1, 16))
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "train/lo')
    assert [r["step"] for r in report.read_metrics(workdir)] == list(range(1, 16))
    write_steps(workdir, range(11, 21), resume_step=10)
    expected = (tmp_path / "reference" / "metrics.jsonl").read_bytes()
    assert (workdir / "metrics.jsonl").read_bytes() == expected


def test_several_records_of_the_resumed_step_are_kept(tmp_path):
    write_steps(tmp_path, [5, 10, 10, 15])
    write_steps(tmp_path, [], resume_step=10)
    assert [r["step"] for r in lines(tmp_path)] == [5, 10, 10]


@pytest.mark.parametrize("resume_step", [0, None])
def test_a_fresh_start_removes_old_records(tmp_path, resume_step):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1], resume_step=resume_step)
    assert [r["step"] for r in lines(tmp_path)] == [1]


def test_a_complete_line_without_newline_is_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    write_steps(tmp_path, [2], resume_step=2)
    assert [r["step"] for r in lines(tmp_path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named_and_left_out(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n')
    assert [r["step"] for r in report.read_metrics(tmp_path)] == [1, 3]
    assert "metrics.jsonl:2" in caplog.text


def test_kill_leaves_at_most_one_incomplete_line(tmp_path):
    """A real process, a real `kill -9`: only the writer's file is under test, so no JAX in it."""
    code = """
import os, sys, types
sys.modules["jax"] = types.SimpleNamespace(process_index=lambda: 0, Device=object)
from attnjax.train.report import MetricsWriter
writer = MetricsWriter(sys.argv[1], 0, tensorboard=False)
print("ready", flush=True)
step = 0
while True:
    step += 1
    writer.write(step, {"train/loss": 1 / step, "train/accuracy": 0.5})
"""
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    raw = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    steps = [r["step"] for r in report.read_metrics(tmp_path)]
    assert len(steps) > 10
    assert steps == list(range(1, len(steps) + 1))
    assert len(raw) - len(steps) <= 1


def test_a_report_that_does_not_fit_names_its_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(AttnjaxError, match=r"report cannot be written: .*too large"):
            report.final_report(tmp_path, {}, {"val/accuracy": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "report").iterdir())


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    writer = report.MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"train/loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
    try:
        with pytest.raises(AttnjaxError, match=r"metrics\.jsonl cannot be written"):
            writer.write(2, {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(2, {"train/loss": 0.5})
    writer.close()
    assert [r["step"] for r in lines(tmp_path)] == [1, 2]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = report.MetricsWriter(tmp_path / "run")
    writer.write(1, {"train/loss": 1.0})
    writer.flush()
    writer.close()
    report.write_environment(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def read_events(path):
    """Decode an event file with TensorBoard's record framing; return its messages."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_resumes_in_a_new_file_that_purges_later_steps(tmp_path):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = report.MetricsWriter(tmp_path, resume_step, tensorboard=True)
        if resume_step:  # Two starts of one process within a second would share a name.
            assert len(list((tmp_path / "tensorboard").iterdir())) >= 1
        for step in steps:
            writer.write(step, {"train/loss": float(step)})
        writer.close()
        time.sleep(1.1)
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    values = [(e.step, e.summary.value[0].simple_value) for e in read_events(first) if e.step]
    assert values == [(1, 1.0), (2, 2.0), (3, 3.0)]
    starts = [e.step for e in read_events(second) if e.HasField("session_log")]
    assert starts[:1] == [3]


def test_environment_says_what_ran_and_keeps_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--hf_token=SECRET-1", "--api_key", "SECRET-2", "--config=x.py"]
    )
    monkeypatch.setenv("HF_TOKEN", "SECRET-3")
    path = report.write_environment(tmp_path)
    text = path.read_text()
    record = json.loads(text)
    assert record["command"] == ["train.py", "--hf_token=***", "--api_key", "***", "--config=x.py"]
    # Not three letters: a commit's hexadecimal digits may spell those.
    assert "SECRET" not in text
    assert record["packages"]["jax"] == jax.__version__
    assert record["devices"] == {jax.devices()[0].device_kind: 8}
    assert record["processes"] == 1
    report.write_environment(tmp_path)
    again = json.loads(report.write_environment(tmp_path).read_text())
    assert [set(e) for e in again["earlier"]] == [set(record), set(record)]


def test_environment_survives_a_damaged_file(tmp_path):
    (tmp_path / "environment.json").write_text("[")
    assert "earlier" not in json.loads(report.write_environment(tmp_path).read_text())


def test_atomic_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "recipe.json"
    report.write_atomically(path, "old")
    report.write_atomically(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["recipe.json"]


RECIPE = {"steps": 20, "batch": 8, "seed": 0, "model": {"name": "crossvit", "preset": "9"}}


def make_explanation(channels=3):
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(3, 24, 24, channels)).astype(np.float32),
        "label": np.array([0, 1, 2]),
        "prediction": np.array([0, 2, 2]),
        "maps": {"small branch": rng.random((3, 4, 4)), "large branch": rng.random((3, 2, 2))},
    }


def is_picture(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return min(pixels.shape) > 200 and pixels.std() > 5


def test_final_report_has_numbers_and_pictures(tmp_path):
    writer = report.MetricsWriter(tmp_path, tensorboard=False)
    for step in range(1, 101):
        loss = float("nan") if step == 50 else 1 / step
        writer.write(step, {"train/loss": loss, "train/accuracy": 0.5, "train/lr": 1e-3})
        if step % 25 == 0:
            writer.write(step, {"val/loss": 0.1, "val/accuracy": 0.9, "val/top5": 1.0})
    writer.close()
    confusion = np.array([[5, 1, 0], [0, 6, 0], [2, 0, 4]])
    results = {"val/accuracy": 15 / 18, "val/loss": 0.25, "val/confusion": confusion}
    names = ("cat", "dog|<b>", "a very long name $of$ a class")
    path = report.final_report(tmp_path, RECIPE, results, make_explanation(), 75.0, names)
    text = path.read_text()
    assert "# crossvit 9" in text and "| val/accuracy | 83.33 % |" in text and "1m 15s" in text
    assert "cat | 2 of 6" in text and r"dog\|\<b\> | 1 of 6" in text
    for name in ("curves", "val_confusion", "attention"):
        assert f"]({name}.png)" in text
        assert is_picture(path.parent / f"{name}.png")
    assert len(os.listdir(path.parent)) == 4


def test_final_report_says_how_well_devices_were_used(tmp_path, monkeypatch):
    speeds = [{"step": i, report._SPEED: speed} for i, speed in enumerate((10.0, 40.0, 20.0))]
    (tmp_path / report.METRICS_FILE).write_text("".join(json.dumps(x) + "\n" for x in speeds))
    page = report.final_report(tmp_path, RECIPE, {}, flops=3e9).read_text()
    assert "3.000e+09" in page and "median speed 20 examples/s" in page
    assert "the peak of cpu is not listed" in page
    monkeypatch.setattr(progress, "_PEAK_FLOPS", (("cpu", 3e11),))
    page = report.final_report(tmp_path, RECIPE, {}, flops=3e9).read_text()
    assert "3.000e+09 x 20 / (8 x 3.000e+11) = 2.5 %" in page


def test_final_report_of_nothing_still_is_a_page(tmp_path):
    path = report.final_report(tmp_path, RECIPE, {})
    assert "20 steps, batch 8" in path.read_text()
    assert os.listdir(path.parent) == ["report.md"]


def test_pictures_take_grey_flat_and_unlabelled_input(tmp_path):
    explanation = make_explanation(channels=1)
    del explanation["label"]
    explanation["image"][1] = 0.0
    explanation["maps"]["small branch"][2] = 0.25
    figures.draw_attention(explanation, tmp_path / "attention.png")
    assert is_picture(tmp_path / "attention.png")
    figures.draw_confusion(np.zeros((30, 30), int), tmp_path / "empty.png")
    assert is_picture(tmp_path / "empty.png")


def test_matplotlib_is_imported_lazily():
    code = "import sys, attnjax.train.report; print('matplotlib' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "False", output.stderr
