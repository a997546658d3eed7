# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: metrics.jsonl, TensorBoard events, environment.json, report/."""

import importlib.metadata
import json
import logging
import math
import numbers
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attnjax.errors import AttnjaxError
from attnjax.train.progress import Profiler, Progress, duration, peak_flops, utilization

_log = logging.getLogger(__name__)

__all__ = [
    "METRICS_FILE",
    "MetricsWriter",
    "Profiler",
    "Progress",
    "final_report",
    "read_metrics",
    "write_atomically",
    "write_environment",
]

METRICS_FILE = "metrics.jsonl"
_EVENTS_FOLDER = "tensorboard"
_SPEED = "speed/examples_per_second"

_PACKAGES = ("attnjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)


def write_atomically(path: str | pathlib.Path, text: str) -> None:
    """Write a small text file so that a reader or a crash sees the old or the new one, no mixture.

    Raises:
      OSError: the folder cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first; none if there is no file.

    An incomplete last line is left out; so is a damaged line before it, with a warning.

    Args:
      path: a run directory, or its metrics.jsonl.
    """
    path = pathlib.Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.exists():
        return []
    return [record for _, record in _parse(path)]


def _parse(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().splitlines(keepends=True)
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(record["step"], int):
                raise ValueError("incomplete")
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                _log.warning("%s:%d is no metrics record (%s): left out", path, number, error)
            continue
        parsed.append((line, record))
    return parsed


class MetricsWriter:
    """Scalars of a run, one JSON object per line of `metrics.jsonl`, and TensorBoard events.

    A line is `{"step": 50, "train/loss": 0.7, ...}`, written by one system call, so that a killed
    process leaves at most one incomplete last line. Values that are not finite become null. There
    are no clock times in it: a run that was interrupted writes the same lines as one that was not.
    Only process 0 writes.
    """

    def __init__(
        self, workdir: str | pathlib.Path, resume_step: int | None = 0, tensorboard: bool = True
    ):
        """Open the file and cut what the resumed run will write again.

        Args:
          workdir: run directory.
          resume_step: steps that the restored checkpoint had done: records of later steps are
            removed. None or 0 starts afresh, with no record.
          tensorboard: also write event files to `<workdir>/tensorboard`.
        """
        self._file: int | None = None
        self._events = None
        if jax.process_index() != 0:
            return
        step = resume_step or 0
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / METRICS_FILE
        _cut(self._path, step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if tensorboard:
            self._events = _open_events(workdir / _EVENTS_FOLDER, step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one record.

        Args:
          step: steps done.
          values: scalars by name.

        Raises:
          TypeError: a value is no scalar.
          AttnjaxError: the line could not be written whole; it is taken back.
        """
        numbers_ = {name: _number(name, value) for name, value in values.items()}
        if self._file is None:
            return
        record = {"step": int(step)}
        record |= {n: v if math.isfinite(v) else None for n, v in numbers_.items()}
        self._append((json.dumps(record, allow_nan=False) + "\n").encode())
        if self._events is not None:
            try:
                for name, value in numbers_.items():
                    self._events.add_scalar(name, value, int(step))
                self._events.flush()
            except OSError as error:
                folder = self._path.parent / _EVENTS_FOLDER
                raise AttnjaxError(f"{folder} cannot be written: {error}") from error

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            problem = None if written == len(line) else "disk full or file size limit reached"
        except OSError as error:
            problem = error.strerror
        if problem:
            # Half a line in the middle of the file would spoil the records around it.
            os.ftruncate(self._file, size)
            raise AttnjaxError(f"{self._path} cannot be written: {problem}")

    def flush(self) -> None:
        """Make everything written so far survive a power cut."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close both sinks; more calls do nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None


def _number(name: str, value: Any) -> float | int:
    if isinstance(value, numbers.Number) and not isinstance(value, complex):
        return value if isinstance(value, int) else float(value)  # type: ignore[arg-type]
    array = np.asarray(value)
    is_number = array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"
    if array.ndim or not is_number:
        raise TypeError(f"metric {name!r} is {array.dtype}{list(array.shape)}, not a scalar")
    return array.item() if array.dtype.kind in "biu" else float(array)


def _cut(path: pathlib.Path, step: int) -> None:
    """Keep complete records up to a step, atomically; of a run that starts afresh, none."""
    if not path.exists():
        return
    kept = (
        b"".join(line for line, record in _parse(path) if record["step"] <= step) if step else b""
    )
    if kept != path.read_bytes():
        write_atomically(path, kept.decode())


def _open_events(folder: pathlib.Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        _log.warning("tensorboardX is not installed: metrics go to %s only", METRICS_FILE)
        return None
    # A new file per start (two starts may share a second), which hides what older files have
    # beyond the resumed step.
    purge = step + 1 if step else None
    return SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{os.getpid()}")


def write_environment(workdir: str | pathlib.Path) -> pathlib.Path:
    """Record in environment.json what the run ran on: versions, devices, commit, command line.

    Environment variables are left out, and arguments that look like secrets are masked. Earlier
    starts in the same directory are kept under `earlier`, oldest first.

    Returns:
      The file. Only process 0 writes it.
    """
    path = pathlib.Path(workdir) / "environment.json"
    if jax.process_index() != 0:
        return path
    current = environment()
    earlier = []
    try:
        previous = json.loads(path.read_text())
        earlier = [*previous.pop("earlier", []), previous]
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    if earlier:
        current["earlier"] = earlier
    write_atomically(path, json.dumps(current, indent=2) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Return versions, platform, devices, processes, source commit and command line."""
    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backend": jax.default_backend(),
        "devices": kinds,
        "processes": jax.process_count(),
        "commit": _commit(),
        "command": _masked(sys.argv),
    }


def _version(package: str) -> str | None:
    if package == "attnjax":
        import attnjax

        return attnjax.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments):
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} with local changes" if commit and changed else commit


def _masked(arguments: list[str]) -> list[str]:
    masked, hides_next = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hides_next:
            masked.append("***")
        elif equals and _SECRET.search(name):
            masked.append(f"{name}=***")
        else:
            masked.append(argument)
        hides_next = argument.startswith("-") and not equals and bool(_SECRET.search(name))
    return masked


def final_report(
    workdir: str | pathlib.Path,
    recipe: Mapping[str, Any],
    results: Mapping[str, Any],
    explanation: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    class_names: tuple[str, ...] = (),
    *,
    flops: float = 0.0,
) -> pathlib.Path:
    """Write `report/report.md` with its pictures: curves, confusion matrices, attention maps.

    Args:
      workdir: run directory; its metrics.jsonl supplies the curves.
      recipe: `Recipe.to_dict()`.
      results: final metrics by name (`val/accuracy`); `[v, v]` arrays are confusion matrices.
      explanation: what a task's `explain` returned, on the host; None leaves the maps out.
      seconds: wall time of the last start of the run.
      class_names: names of the classes; numbers by default.
      flops: analytic operations per example of training, without recomputation; 0 leaves out how
        well the devices were used.

    Returns:
      Path of report.md.

    Raises:
      AttnjaxError: the folder cannot be written.
    """
    folder = pathlib.Path(workdir) / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write_report(folder, recipe, results, explanation, seconds, class_names, flops)
    except OSError as error:
        raise AttnjaxError(f"{folder} cannot be written: {error}") from error


def _write_report(
    folder, recipe, results, explanation, seconds, class_names, flops
) -> pathlib.Path:
    from attnjax.train import figures

    workdir = folder.parent
    records = read_metrics(workdir)
    model = recipe.get("model", {})
    title = " ".join(str(model[k]) for k in ("name", "preset") if model.get(k)) or "run"
    lines = [f"# {_plain(title)}", ""]

    scores = {n: float(v) for n, v in results.items() if np.ndim(v) == 0}
    if scores:
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {_plain(name)} | {_score(name, v)} |" for name, v in scores.items()]
        lines.append("")
    lines += [_facts(recipe, seconds), ""]
    if flops > 0:
        lines += [_utilization(records, flops), ""]

    if figures.draw_curves(records, folder / "curves.png"):
        lines += ["## Training", "", "![loss, accuracy and learning rate](curves.png)", ""]
    for name, counts in results.items():
        if np.ndim(counts) != 2:
            continue
        file = f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.png"
        figures.draw_confusion(np.asarray(counts), folder / file, class_names)
        lines += [f"## Confusion ({_plain(name.partition('/')[0])})", ""]
        lines += [f"![confusion matrix]({file})", "", *_mistakes(np.asarray(counts), class_names)]
    if explanation and explanation.get("maps") and "image" in explanation:
        figures.draw_attention(explanation, folder / "attention.png", class_names)
        lines += ["## Attention", "", "![attention maps](attention.png)", ""]
        lines += ["Bright patches get more attention; each map is scaled to its own range.", ""]
    path = folder / "report.md"
    write_atomically(path, "\n".join(lines))
    return path


def _score(name: str, value: float) -> str:
    is_share = name.rpartition("/")[2].startswith(("accuracy", "top"))
    return f"{100 * value:.2f} %" if is_share else f"{value:.5g}"


def _facts(recipe: Mapping[str, Any], seconds: float | None) -> str:
    facts = [f"{recipe[k]} {k}" for k in ("steps",) if k in recipe]
    facts += [f"{k} {recipe[k]}" for k in ("batch", "seed") if k in recipe]
    kinds = ", ".join(f"{n} x {kind}" for kind, n in environment()["devices"].items())
    facts.append(f"on {kinds}")
    if seconds is not None:
        facts.append(f"{duration(seconds)} in the last start")
    return (
        _plain(", ".join(facts)) + ". Settings: `../recipe.json`, versions: `../environment.json`."
    )


def _utilization(records: Sequence[Mapping[str, Any]], flops: float) -> str:
    """Say how model FLOP utilisation is worked out, with the median speed of the run."""
    text = f"Analytic operations per example {flops:.3e} (both ways, without recomputation)"
    speeds = [record[_SPEED] for record in records if _SPEED in record]
    if not speeds:
        return text + "."
    speed, devices = statistics.median(speeds), jax.devices()
    text += f", median speed {speed:.4g} examples/s. Model FLOP utilisation = operations x "
    text += "examples/s / (devices x bfloat16 peak) = "
    mfu, peak = utilization(flops, speed, devices), peak_flops(devices[0].device_kind)
    if mfu is None:
        return text + f"unknown: the peak of {_plain(devices[0].device_kind)} is not listed."
    return text + f"{flops:.3e} x {speed:.4g} / ({len(devices)} x {peak:.3e}) = {100 * mfu:.2g} %."


def _mistakes(counts: np.ndarray, names: tuple[str, ...], shown: int = 5) -> list[str]:
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:shown]
    pairs = [np.unravel_index(i, counts.shape) for i in order]
    rows = [
        f"| {_plain(_class(i, names))} | {_plain(_class(j, names))} | {wrong[i, j]} "
        f"of {counts[i].sum()} |"
        for i, j in pairs
        if wrong[i, j]
    ]
    if not rows:
        return ["No mistakes.", ""]
    return ["Most frequent mistakes:", "", "| true | predicted | examples |", "|---|---|---|"] + [
        *rows,
        "",
    ]


def _class(index, names: tuple[str, ...]) -> str:
    return str(names[index]) if index < len(names) else str(index)


def _plain(text: str) -> str:
    """Escape what Markdown or HTML would interpret: names may come from data."""
    return re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", str(text)).replace("\n", " ")
