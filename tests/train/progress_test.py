# SPDX-License-Identifier: Apache-2.0
"""Progress lines, utilisation, memory, and the profiler window."""

import logging
import types

import jax
import jax.numpy as jnp
import pytest

from attnjax.train import progress
from attnjax.train.progress import Profiler, Progress, duration, memory_in_use, peak_flops


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "attnjax")
    return caplog


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_line_has_rate_eta_loss_and_no_invented_utilisation(log):
    clock = Clock()
    run = Progress(100, 8, 1e9, every=10, clock=clock)
    clock.now = 30.0
    run.log(10, {"train/loss": 2.5, "train/lr": 1e-3})
    clock.now = 35.0
    rates = run.log(20, {"train/loss": 1.25, "train/accuracy": 0.5, "train/grad_norm": 9.0})
    assert "compilation included" in log.messages[0] and "mfu" not in log.messages[0]
    for part in ("step 20/100 (20%)", "eta 40s", "loss 1.2500", "accuracy 0.500", "16 examples/s",
                 "mfu n/a", "process memory"):  # fmt: skip
        assert part in log.messages[1]
    assert "grad_norm" not in log.messages[1]
    assert rates["speed/examples_per_second"] == 16.0
    assert "speed/mfu" not in rates and rates["speed/memory_gib"] > 0


def test_evaluation_time_does_not_count(log):
    clock = Clock()
    run = Progress(100, 8, 1e9, clock=clock)
    run.log(10, {})
    clock.now = 1000.0
    run.note(10, {"val/accuracy": 0.75})
    clock.now = 1001.0
    assert run.log(20, {})["speed/examples_per_second"] == 80.0
    assert log.messages[1] == "step 10/100  val/accuracy 0.75"


def test_resumed_run_counts_its_own_steps_only():
    clock = Clock()
    run = Progress(100, 4, 1e9, first_step=60, clock=clock)
    clock.now = 10.0
    assert run.log(70, {})["speed/examples_per_second"] == 4.0


def test_utilisation_is_flops_over_peak(monkeypatch, log):
    chips = [types.SimpleNamespace(device_kind="TPU v5 lite", memory_stats=lambda: None)] * 4
    monkeypatch.setattr(jax, "devices", lambda: chips)
    clock = Clock()
    run = Progress(100, 197, 1e12, clock=clock)
    run.log(1, {})
    clock.now = 1.0
    rates = run.log(2, {})
    assert rates["speed/mfu"] == pytest.approx(0.25)
    assert "mfu 25.0%" in log.messages[-1]


def test_only_the_first_process_logs(monkeypatch, log):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run = Progress(10, 1, 1.0)
    run.log(1, {})
    run.note(1, {"val/loss": 1.0})
    assert not log.messages


def test_bar_appears_on_a_terminal_only(monkeypatch, log):
    pytest.importorskip("tqdm")
    assert Progress(10, 1, 1.0)._bar is None
    terminal = types.SimpleNamespace(isatty=lambda: True, write=lambda text: None,
                                     flush=lambda: None, encoding="utf-8")  # fmt: skip
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    run = Progress(10, 1, 1.0, first_step=2)
    run.log(5, {"train/loss": 1.0})
    assert run._bar.n == 5 and not log.messages
    run.close()
    run.close()


def test_memory_is_the_highest_device_peak_or_the_process():
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3})
    other = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7})
    assert memory_in_use([device, other]) == ("device", 7.0)
    place, size = memory_in_use()
    assert place == "process" and size > 2**20


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7s"), (59.6, "1m 00s"), (185, "3m 05s"), (3720, "1h 02m"), (183600, "2d 03h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_profiler_traces_its_window_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = Profiler(tmp_path, 3, 2)
    seen = []
    for step in range(8):
        profiler.at(step)
        seen.append(len(calls))
    profiler.close()
    assert calls == ["start", "stop"]
    assert seen == [0, 0, 0, 1, 1, 2, 2, 2]
    for off in (Profiler(tmp_path, -1, 3), Profiler(tmp_path, 0, 0)):
        off.at(0)
        off.close()
    resumed = Profiler(tmp_path, 3, 2)
    resumed.at(4)
    resumed.close()
    assert calls == ["start", "stop"] * 2


def test_profiler_writes_a_trace(tmp_path):
    profiler = Profiler(tmp_path, 0, 1)
    profiler.at(0)
    jnp.ones(8).sum().block_until_ready()
    profiler.at(1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
