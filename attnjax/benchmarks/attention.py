# SPDX-License-Identifier: Apache-2.0
"""The attention benchmark: implementations and peers in turns, over masks, dtypes and shapes.

A cell is one contestant on one case. Contestants of a case alternate in one process (PyTorch in its
own), so that ratios between them are fair on a busy machine; a refusal or running out of memory is
a value of its cell. Results are appended to a CSV file case by case, and cells that the file
already holds are not measured again.
"""

import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from attnjax.benchmarks import table
from attnjax.benchmarks.contestants import CONTESTANTS, MASKS, Case, Torch, with_backward
from attnjax.benchmarks.figures import draw_attention as draw
from attnjax.timing import Timing, alternate

__all__ = ["FIELDS", "SHAPES", "cell", "draw", "grid", "measure", "names", "read", "render",
           "row_cell", "run"]  # fmt: skip

# b, t, n, k, h
SHAPES = {
    "quick": ((4, 512, 8, 8, 64), (1, 2048, 8, 8, 64)),
    "standard": (
        (4, 512, 8, 8, 64), (1, 2048, 8, 8, 64), (1, 8192, 8, 8, 64), (1, 2048, 8, 2, 128),
    ),
    "long": ((1, 8192, 8, 8, 64), (1, 16384, 16, 16, 128), (1, 32768, 16, 16, 128)),
}  # fmt: skip
"""Named sets of shapes."""

DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "both")

FIELDS = (
    "contestant", "mask", "dtype", "b", "t", "n", "k", "h", "direction", "status", "median_ms",
    "low_ms", "high_ms", "rounds", "tflops", "area", "temporary_bytes", "compile_seconds", "device",
    "cores", "jax",
)  # fmt: skip
"""Columns of the CSV file. `status` is ok, refused: REASON, or out of memory."""


def grid(shapes: str, only: str = "") -> list[tuple[Case, list[str]]]:
    """List the cases of a set of shapes with the contestants of each.

    Args:
      shapes: key of `SHAPES`.
      only: regular expression searched in cell names such as
        "chunked/causal/float32/1x2048x8x8x64/forward"; empty for all.

    Returns:
      Cases in order, each with the names of its contestants.

    Raises:
      ValueError: the set is unknown, the expression is malformed, or nothing is left.
    """
    if shapes not in SHAPES:
        raise ValueError(f"shapes {shapes!r} are unknown; choose from {list(SHAPES)}")
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise ValueError(f"only={only!r} is no regular expression: {error}") from error
    cases = []
    for b, t, n, k, h in SHAPES[shapes]:
        for name in MASKS:
            for dtype in DTYPES:
                for direction in DIRECTIONS:
                    case = Case(name, dtype, b, t, n, k, h, direction)
                    chosen = [c for c in (*CONTESTANTS, "torch") if pattern.search(cell(c, case))]
                    if chosen:
                        cases.append((case, chosen))
    if not cases:
        raise ValueError(f"only={only!r} matches no cell such as {cell('chunked', case)!r}")
    return cases


def cell(contestant: str, case: Case) -> str:
    """Return the name of a cell."""
    size = "x".join(str(x) for x in (case.b, case.t, case.n, case.k, case.h))
    return f"{contestant}/{case.mask}/{case.dtype}/{size}/{case.direction}"


def names(cases: Iterable[tuple[Case, Sequence[str]]]) -> list[str]:
    """Return the names of all cells of `grid`'s cases."""
    return [cell(name, case) for case, contestants in cases for name in contestants]


def run(
    cases: Iterable[tuple[Case, Sequence[str]]],
    path: pathlib.Path,
    *,
    budget: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure cells and append them to a CSV file.

    Args:
      cases: from `grid`.
      path: CSV file; cells it already holds are kept and skipped.
      budget: seconds of timing per case.
      say: called with one line per case.

    Returns:
      All rows of the file, old and new.
    """
    rows = read(path)
    known = {row_cell(row) for row in rows}
    with Torch(threads=os.cpu_count() or 1) as torch:
        for case, names in cases:
            missing = [name for name in names if cell(name, case) not in known]
            if not missing:
                continue
            fresh = measure(case, missing, torch, budget)
            table.append(path, FIELDS, fresh)
            rows += fresh
            times = ", ".join(
                f"{r['contestant']} {r['median_ms']} ms" for r in fresh if r["status"] == "ok"
            )
            say(f"{cell('', case)[1:]}: {times or 'everybody refused'}")
    return rows


def measure(case: Case, names: Sequence[str], torch: Torch, budget: float) -> list[dict[str, Any]]:
    """Measure the named contestants on one case, in turns, and return one row for each."""
    rows = {name: _blank(name, case) for name in names}
    runners: dict[str, Callable[[], float]] = {}
    arrays = case.arrays()
    for name in names:
        try:
            runners[name] = (
                torch.prepare(case) if name == "torch" else _compile(name, case, arrays, rows[name])
            )
        except NotImplementedError as refusal:
            reason = " ".join(str(refusal).split())
            rows[name]["status"] = f"refused: {reason}"
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows[name]["status"] = "out of memory"
    if not runners:
        return list(rows.values())
    # A runner returns its own seconds, so that talking to another process does not count.
    own: dict[str, list[float]] = {name: [] for name in runners}
    turns = {name: (lambda name=name: own[name].append(runners[name]())) for name in runners}
    timings = alternate(turns, rounds=40, warmup=1, budget=budget)
    for name, timing in timings.items():
        seconds = Timing(tuple(own[name][1:]))
        assert len(seconds.seconds) == len(timing.seconds)
        rows[name] |= {
            "status": "ok",
            "median_ms": round(1e3 * seconds.median, 4),
            "low_ms": round(1e3 * seconds.quantile(0.2), 4),
            "high_ms": round(1e3 * seconds.quantile(0.8), 4),
            "rounds": len(seconds.seconds),
            "tflops": round(case.flops / seconds.median / 1e12, 4),
        }
    return list(rows.values())


def _blank(name, case):
    empty = dict.fromkeys(FIELDS, "")
    shape = {k: v for k, v in dataclasses.asdict(case).items()}
    device = jax.devices()[0]
    return {
        **empty,
        **shape,
        "contestant": name,
        "area": case.area,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def _compile(name, case, arrays, row):
    """Compile a contestant; return a function that runs it once and returns the seconds."""
    *inputs, cotangent = arrays
    attend = CONTESTANTS[name](case)
    arguments = (*inputs, cotangent) if case.direction == "both" else tuple(inputs)
    begun = time.perf_counter()
    try:
        function = jax.jit(with_backward(attend) if case.direction == "both" else attend)
        compiled = function.lower(*arguments).compile()
    except ExceptionGroup as group:
        raise NotImplementedError("; ".join(str(e) for e in group.exceptions)) from group
    row["compile_seconds"] = round(time.perf_counter() - begun, 2)
    row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes

    def once():
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - begun

    return once


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file; none when it does not exist.

    Raises:
      ValueError: the file has other columns.
    """
    return table.read(path, FIELDS)


def row_cell(row: dict[str, Any]) -> str:
    """Return the name of the cell that a row belongs to."""
    numbers = {name: int(row[name]) for name in "btnkh"}
    case = Case(row["mask"], row["dtype"], direction=row["direction"], **numbers)
    return cell(row["contestant"], case)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return a text table: one line per case, contestants as columns, milliseconds."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        name = row_cell(row)
        cases.setdefault(name.partition("/")[2], {})[row["contestant"]] = row
    used = {r["contestant"] for r in rows if r["status"] == "ok"}
    names = [name for name in (*CONTESTANTS, "torch") if name in used]
    width = max([len(case) for case in cases] + [4])
    lines = [f"{'ms':{width}}" + "".join(f"{name:>13}" for name in names)]
    for case, found in cases.items():
        cells = []
        for name in names:
            row = found.get(name)
            status = "" if row is None else row["status"]
            text = f"{float(row['median_ms']):.2f}" if status == "ok" else status[:7]
            cells.append(f"{text:>13}")
        lines.append(f"{case:{width}}" + "".join(cells))
    refusals = sorted({r["status"] for r in rows if r["status"].startswith("refused")})
    return "\n".join([*lines, *(f"  {text}" for text in refusals)])
