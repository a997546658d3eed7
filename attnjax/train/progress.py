# SPDX-License-Identifier: Apache-2.0
"""How fast a run goes: progress lines, model FLOP utilisation, memory, the profiler window."""

import logging
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax

_log = logging.getLogger(__name__)

_PEAK_FLOPS = (
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    # 2307e12 per chip, and a chip is two JAX devices.
    (r"TPU7x|TPU v7x", 1153.5e12),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H[12]00 NVL", 835e12),
    (r"NVIDIA H[12]00.*", 989e12),
)
"""Dense bfloat16 peak of one JAX device by `device_kind`, from the vendors' data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 operations per second of one device.

    Args:
      device_kind: `jax.Device.device_kind`.

    Returns:
      The peak, or None where it is not known: CPUs, other accelerators, slices of a GPU.
    """
    if "MIG" in device_kind:
        return None
    for pattern, peak in _PEAK_FLOPS:
        if re.fullmatch(pattern, device_kind):
            return peak
    return None


def utilization(
    flops: float, examples_per_second: float, devices: Sequence[jax.Device]
) -> float | None:
    """Return model FLOP utilisation: `flops * examples/s / (devices * peak)`.

    Args:
      flops: analytic operations per example, without recomputation.
      examples_per_second: over all devices.
      devices: the devices of the run, all alike.

    Returns:
      A fraction of the bfloat16 peak, whatever dtype the run computes in; None if it is not known.
    """
    peak = peak_flops(devices[0].device_kind)
    if peak is None or flops <= 0:
        return None
    return flops * examples_per_second / (len(devices) * peak)


def memory_in_use(devices: Sequence[jax.Device] | None = None) -> tuple[str, float]:
    """Return where memory was measured and how many bytes.

    Args:
      devices: local devices; all by default.

    Returns:
      ("device", highest peak of any device), or ("process", resident memory) for devices without
      statistics, such as CPUs.
    """
    peaks = []
    for device in jax.local_devices() if devices is None else devices:
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            peaks.append(stats["peak_bytes_in_use"])
    if peaks:
        return "device", float(max(peaks))
    return "process", _resident_bytes()


def _resident_bytes() -> float:
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return float(pages * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else peak * 1024)


class Progress:
    """Progress of a run: a log line per interval, and a bar when someone watches.

    Lines are written by process 0 only. Time between `note` and the step before it (evaluation)
    does not count as training time.
    """

    def __init__(
        self,
        steps: int,
        batch: int,
        flops: float,
        *,
        first_step: int = 0,
        every: int = 1,
        clock: Callable[[], float] = time.monotonic,
        bar: bool | None = None,
    ):
        """Start the clock.

        Args:
          steps: steps of the whole run.
          batch: examples per step over all processes.
          flops: training operations per example.
          first_step: steps that were done before this process started.
          every: steps between log lines.
          clock: seconds; for tests.
          bar: show a bar; by default where standard error is a terminal and tqdm is installed.
        """
        self._steps, self._batch, self._flops, self._every = steps, batch, flops, every
        self._clock = clock
        self._is_first_process = jax.process_index() == 0
        self._mark = (first_step, clock())
        self._has_compiled = False
        self._seconds_per_step: float | None = None
        self._bar = self._open_bar(first_step) if bar is not False else None
        if bar and self._bar is None:
            _log.warning("no progress bar: tqdm is not installed")

    def _open_bar(self, first_step: int):
        if not (self._is_first_process and sys.stderr.isatty()):
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=self._steps, initial=first_step, unit="step", dynamic_ncols=True)

    def log(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Log a line and return the rates since the last `log` or `note`.

        Args:
          step: steps done.
          values: metrics of this step; the loss, accuracy and learning rate are shown.

        Returns:
          `speed/examples_per_second`, `speed/memory_gib` and, where the peak of the device is known
          and compilation is over, `speed/mfu`.
        """
        previous_step, previous = self._mark
        now = self._clock()
        self._mark = (step, now)
        done, seconds = step - previous_step, max(now - previous, 1e-9)
        rates = {}
        place, memory = memory_in_use()
        mfu = None
        if done > 0:
            self._seconds_per_step = seconds / done
            rates["speed/examples_per_second"] = done * self._batch / seconds
            if self._has_compiled:
                mfu = utilization(self._flops, done * self._batch / seconds, jax.devices())
        if mfu is not None:
            rates["speed/mfu"] = mfu
        rates["speed/memory_gib"] = memory / 2**30
        if self._is_first_process:
            parts = [
                f"step {step}/{self._steps} ({100 * step / self._steps:.0f}%)",
                f"eta {self._eta(step)}",
                *_shown(values),
            ]
            if "speed/examples_per_second" in rates:
                parts.append(f"{_rate(rates['speed/examples_per_second'])} examples/s")
            if self._has_compiled:
                parts.append("mfu n/a" if mfu is None else f"mfu {100 * mfu:.1f}%")
            else:
                parts.append("compilation included")
            parts.append(f"{place} memory {memory / 2**30:.2f} GiB")
            self._say(step, "  ".join(parts))
        self._has_compiled = True
        return rates

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Log a line of evaluation results and leave out the time that they took."""
        if self._is_first_process:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._say(step, f"step {step}/{self._steps}  {shown}")
        self._mark = (step, self._clock())

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, step: int, line: str) -> None:
        if self._bar is None:
            _log.info("%s", line)
            return
        self._bar.update(step - self._bar.n)
        self._bar.write(line, file=sys.stderr)

    def _eta(self, step: int) -> str:
        if self._seconds_per_step is None:
            return "unknown"
        return duration(self._seconds_per_step * max(self._steps - step, 0))


def duration(seconds: float) -> str:
    """Write seconds as `2d 03h`, `1h 02m`, `3m 05s` or `7s`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    return f"{minutes}m {second:02d}s" if minutes else f"{second}s"


def _shown(values: Mapping[str, float]) -> list[str]:
    by_name = {name.rpartition("/")[2]: value for name, value in values.items()}
    formats = (("loss", ".4f"), ("accuracy", ".3f"), ("lr", ".2e"))
    return [f"{name} {by_name[name]:{form}}" for name, form in formats if name in by_name]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Profiler:
    """A `jax.profiler` trace of a range of steps, under `<workdir>/profile`, by process 0."""

    def __init__(self, workdir: str | pathlib.Path, start: int, steps: int):
        """Plan the window.

        Args:
          workdir: run directory.
          start: first traced step; negative: never. A run that resumes inside the window traces
            what is left of it.
          steps: number of traced steps.
        """
        self._folder = pathlib.Path(workdir) / "profile"
        is_wanted = start >= 0 and steps > 0 and jax.process_index() == 0
        self._window = range(start, start + steps) if is_wanted else range(0)
        self._is_tracing = False

    def at(self, step: int) -> None:
        """Start or stop the trace; call before each step with the number of steps done."""
        if not self._is_tracing and step in self._window:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True
            _log.info("profiling steps %d to %d", step, self._window[-1])
        elif self._is_tracing and step not in self._window:
            self.close()

    def close(self) -> None:
        """Stop the trace if it is running."""
        if not self._is_tracing:
            return
        self._is_tracing = False
        # Steps are dispatched ahead of the devices: wait, or the trace ends before they run.
        for device in jax.local_devices():
            (jax.device_put(0, device) + 1).block_until_ready()
        jax.profiler.stop_trace()
        _log.info("profile written to %s", self._folder)
