# SPDX-License-Identifier: Apache-2.0
"""Bad steps are recorded and stop a run, signals stop it between steps, silence ends it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import AttnjaxError, Diverged
from attnjax.train.guards import BadStepGuard, StopRequest, Watchdog, require_finite
from attnjax.train.state import GuardState, TrainState

HEALTHY = {"loss": 1.0, "grad_norm": 2.0, "skipped": 0.0}


def lines(guard):
    return [json.loads(line) for line in guard.path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"loss": np.nan, "grad_norm": 1.0, "skipped": 1.0}, "loss is not finite"),
        ({"loss": 1.0, "grad_norm": np.inf, "skipped": 1.0}, "gradient is not finite"),
        ({"loss": 99.0, "grad_norm": 1.0, "skipped": 1.0}, "loss is a spike"),
        ({"loss": np.inf, "grad_norm": np.nan, "skipped": 0.0}, "loss is not finite"),
    ],
)
def test_bad_steps_are_recorded_with_their_examples(tmp_path, metrics, reason):
    guard = BadStepGuard(tmp_path, patience=2)
    assert not guard.observe(1, HEALTHY, np.arange(4))
    assert not guard.path.exists()
    assert guard.observe(2, {k: jnp.float32(v) for k, v in metrics.items()}, np.arange(4) + 10)
    assert guard.streak == 1
    (line,) = lines(guard)
    assert (line["step"], line["reason"], line["ids"]) == (2, reason, [10, 11, 12, 13])
    json.dumps(line, allow_nan=False)


def test_only_bad_steps_in_a_row_stop_the_run(tmp_path):
    guard = BadStepGuard(tmp_path, patience=3)
    bad = {**HEALTHY, "skipped": 1.0}
    for step, metrics in enumerate([bad, bad, HEALTHY, bad, bad]):
        guard.observe(step, metrics, [step])
    with pytest.raises(Diverged, match=r"step 5: .* last of 3 bad steps") as error:
        guard.observe(5, bad, [5])
    assert error.value.exit_code == 5
    assert [line["step"] for line in lines(guard)] == [0, 1, 3, 4, 5]


def test_rewind_forgets_steps_that_are_repeated(tmp_path):
    guard = BadStepGuard(tmp_path, patience=9)
    guard.rewind(0)
    for step in (3, 5, 8):
        guard.observe(step, {**HEALTHY, "skipped": 1.0}, [step])
    with guard.path.open("a") as file:
        file.write('{"step": 9, "lo')
    guard.rewind(5)
    assert [line["step"] for line in lines(guard)] == [3, 5]


def test_unwritable_record_names_the_path(tmp_path):
    guard = BadStepGuard(tmp_path / "missing", patience=9)
    with pytest.raises(AttnjaxError, match=r"missing/bad_steps\.jsonl"):
        guard.observe(1, {**HEALTHY, "skipped": 1.0}, [1])


def test_the_count_in_the_state_goes_on_after_a_restart(tmp_path):
    guard = BadStepGuard(tmp_path, patience=4)
    guard.observe(9, {**HEALTHY, "skipped": 1.0, "bad_steps": jnp.float32(3)}, [1])
    assert guard.streak == 3
    with pytest.raises(Diverged, match="last of 4 bad steps"):
        guard.observe(10, {**HEALTHY, "skipped": 1.0, "bad_steps": jnp.float32(4)}, [1])


@pytest.mark.parametrize("part", ["params", "opt_state", "ema"])
def test_a_state_that_is_not_finite_is_refused(part):
    fine = {"w": jnp.ones(3), "count": jnp.int32(2)}
    parts = {"params": fine, "opt_state": (fine, ()), "ema": ()}
    rest = {"step": jnp.int32(4), "key": jax.random.key(0), "guard": GuardState.zero()}
    require_finite(4, TrainState(**parts, **rest))
    for value in (np.nan, np.inf):
        bad = {f"w{i}": jnp.ones((2, 3)).at[1, 2].set(value) for i in range(12)}
        with pytest.raises(
            Diverged, match=rf"step 4: {part}/w0, .* and 2 more not finite"
        ) as error:
            require_finite(4, TrainState(**{**parts, part: bad}, **rest))
        assert error.value.exit_code == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_a_flag_and_handlers_are_put_back(number):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        assert stop.reason == number.name
        assert signal.getsignal(number) is signal.SIG_DFL
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM) is before, stop.requested(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, False)]


def start(body):
    code = "import os, signal, sys, time\nfrom attnjax.train.guards import StopRequest, Watchdog\n"
    return subprocess.Popen(
        [sys.executable, "-c", code + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_second_signal_ends_the_process_at_once():
    process = start(
        """
        with StopRequest() as stop:
            print("ready", flush=True)
            while True:
                time.sleep(0.05)
                if stop.requested(1):
                    print("asked", flush=True)
        """
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_joined_process_stops_on_sigterm_and_sigint():
    """With `jax.distributed` its preemption service tells the processes, for both signals."""
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(
            """
            import socket
            import jax
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            jax.distributed.initialize(f"localhost:{port}", 1, 0)
            with StopRequest() as stop:
                print("ready", flush=True)
                for step in range(1, 200):
                    time.sleep(0.1)
                    if stop.requested(step):
                        print("stopped", flush=True)
                        break
            jax.distributed.shutdown()
            """
        )
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert output == "stopped\n", errors
        assert process.returncode == 0, errors


def test_watchdog_lets_steps_and_pauses_pass():
    with Watchdog(0.4) as watchdog:
        for _ in range(6):
            time.sleep(0.1)
            watchdog.beat()
        with watchdog.paused():
            time.sleep(0.8)
    with Watchdog(0):
        pass
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


@pytest.mark.parametrize(
    "hang",
    [
        "time.sleep(60)",
        # Holds the interpreter lock: only the timer in C can end this.
        "import ctypes; ctypes.PyDLL(None).sleep(30)",
    ],
)
def test_watchdog_prints_the_stack_that_hangs_and_exits(hang):
    start_time = time.monotonic()
    process = start(
        f"""
        def wait_for_ever():
            {hang}
        with Watchdog(2) as watchdog:
            watchdog.beat()
            wait_for_ever()
        """
    )
    _, errors = process.communicate(timeout=45)
    assert process.returncode == 1
    assert "wait_for_ever" in errors
    assert time.monotonic() - start_time < 40
