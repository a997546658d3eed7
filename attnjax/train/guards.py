# SPDX-License-Identifier: Apache-2.0
"""What ends a run from outside its numbers: bad steps in a row, signals, and silence.

The step itself decides whether an update is bad and skips it (`train.step`); here are the parts
with a file handle, a signal handler or a clock.
"""

import contextlib
import faulthandler
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from attnjax.errors import FAILED, AttnjaxError, Diverged
from attnjax.train import integrity
from attnjax.train.state import TrainState

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LISTED = 10


class BadStepGuard:
    """Records bad steps with their examples, and stops the run after too many in a row.

    Args:
      workdir: run folder; `bad_steps.jsonl` in it gets one line per bad step.
      patience: bad steps in a row after which the run stops.
    """

    def __init__(self, workdir: str | os.PathLike, patience: int):
        self.path = pathlib.Path(workdir) / "bad_steps.jsonl"
        self._patience = patience
        self._streak = 0

    @property
    def streak(self) -> int:
        """Bad steps in a row up to the last one observed.

        While it is not zero, scheduled saves wait: of the few steps that are kept, none should be
        given up for one that may already be stuck.
        """
        return self._streak

    def rewind(self, step: int) -> None:
        """Forget recorded steps after `step`, which a resumed run is about to repeat."""
        if jax.process_index() or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _recorded_step(line) <= step]
        if len(kept) != len(lines):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self.path)

    def observe(self, step: int, metrics: Mapping[str, Any], ids: Any) -> bool:
        """Look at the metrics of one step.

        Args:
          step: number of the step.
          metrics: `loss`, `grad_norm` and `skipped` as scalars, equal on every process; and
            `bad_steps`, the count in the training state, which goes on after a restart.
          ids: example ids of this process's share of the batch.

        Returns:
          Whether the step was bad.

        Raises:
          Diverged: it was the last one of `patience` bad steps in a row.
        """
        loss, norm = float(metrics["loss"]), float(metrics.get("grad_norm", 0.0))
        if not float(metrics.get("skipped", 0.0)) and np.isfinite(loss) and np.isfinite(norm):
            self._streak = 0
            return False
        self._streak = max(self._streak + 1, int(metrics.get("bad_steps", 0)))
        reason = "loss is a spike"
        if not np.isfinite(loss):
            reason = "loss is not finite"
        elif not np.isfinite(norm):
            reason = "gradient is not finite"
        ids = np.asarray(ids).reshape(-1)
        if jax.process_count() > 1:
            # The metrics are equal everywhere, so every process gets here.
            ids = np.asarray(multihost_utils.process_allgather(ids, tiled=True))
        if jax.process_index() == 0:
            self._append(step, loss, norm, ids.tolist(), reason)
        if self._streak >= self._patience:
            raise Diverged(
                f"step {step}: {reason}, the last of {self._streak} bad steps in a row; "
                f"their examples are listed in {self.path}"
            )
        return True

    def _append(self, step: int, loss: float, norm: float, ids: list, reason: str) -> None:
        # Strings for values that JSON has no number for.
        loss, norm = (x if np.isfinite(x) else str(x) for x in (loss, norm))
        line = {"step": step, "loss": loss, "grad_norm": norm, "reason": reason, "ids": ids}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise AttnjaxError(f"cannot write {self.path}: {error}") from error


def require_finite(step: int, state: TrainState) -> None:
    """Refuse to save a state from which a run could only continue with NaN.

    Skipped updates keep the state finite; this is for runs that switched skipping off, and for
    finite updates that overflow a parameter.

    Args:
      step: number of the step, for the message.
      state: the state after it.

    Raises:
      Diverged: parameters, optimiser state or averages hold NaN or infinity (up to ten are named).
    """
    saved = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}
    wrong = integrity.not_finite(integrity.flatten(saved))
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise Diverged(
            f"step {step}: {', '.join(wrong[:_LISTED])}{more} not finite; this step is not saved"
        )


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that all processes see at the same step.

    Use as a context manager in the main thread; elsewhere it does nothing. A second signal ends the
    process at once.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Name of the signal that this process received, or "another process"."""
        return self._received.name if self._received else "another process"

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # A joined process leaves SIGTERM to the preemption service of `jax.distributed`,
                # which tells the others; a handler of ours would switch that off.
                if number is signal.SIGINT or not jax.distributed.is_initialized():
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        self._received = signal.Signals(number)
        for handled in self._previous:
            signal.signal(handled, signal.SIG_DFL)
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Tell whether the run must stop after this step; equal on every process.

        Every process must ask at every step, with steps that increase by one.
        """
        if jax.distributed.is_initialized():
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._received is not None


class Watchdog:
    """Ends the process when no step completes for too long, with the stacks of all its threads.

    A hung loader or a dead peer otherwise blocks a run for as long as the scheduler lets it.

    Args:
      timeout: seconds; 0 switches it off.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._interval = min(timeout / 4, 5.0)
        self._last = time.monotonic()
        self._paused = 0
        self._done = threading.Event()
        self._process, self._has_peers = "", False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._timeout > 0:
            self._process = f"process {jax.process_index()} of {jax.process_count()}"
            self._has_peers = jax.process_count() > 1
            self.beat()
            self._arm()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Report progress."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Allow a part without steps (compilation, evaluation) to take any time."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.beat()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._arm()
            silent = time.monotonic() - self._last
            if silent > self._timeout and not self._paused:
                self._end(silent)

    def _arm(self) -> None:
        # Should a thread hold the interpreter lock, ours cannot run, but the timer in C can.
        faulthandler.dump_traceback_later(self._timeout + 2 * self._interval, exit=True)

    def _end(self, silent: float) -> None:
        print(
            f"watchdog: {self._process} completed no step for {silent:.0f} s; stacks follow",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self._has_peers:
            # The others end with the first one: leave the one that hangs time to show its stacks.
            time.sleep(2 * self._interval)
        # An orderly exit would wait for the very thread that hangs.
        os._exit(FAILED)


def _recorded_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        # The rest of a line that a killed process left behind.
        return float("inf")
