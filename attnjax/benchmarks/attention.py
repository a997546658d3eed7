# SPDX-License-Identifier: Apache-2.0
"""The attention benchmark: implementations and peers in turns, over masks, dtypes and shapes.

A cell is one contestant on one case. Contestants of a case alternate in one process (PyTorch in its
own), so that ratios between them are fair on a busy machine; a refusal or running out of memory is
a value of its cell. Results are appended to a CSV file case by case, and cells that the file
already holds are not measured again.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from attnjax.benchmarks import turns
from attnjax.benchmarks.contestants import (
    CONTESTANTS,
    MASKS,
    Case,
    Function,
    Torch,
    with_backward,
)
from attnjax.benchmarks.figures import draw_attention
from attnjax.benchmarks.turns import Protocol

# b, t, n, k, h
SHAPES = {
    "quick": ((4, 512, 8, 8, 64), (1, 2048, 8, 8, 64)),
    "standard": (
        (4, 512, 8, 8, 64), (1, 2048, 8, 8, 64), (1, 8192, 8, 8, 64), (1, 2048, 8, 2, 128),
    ),
    "long": ((1, 8192, 8, 8, 64), (1, 16384, 16, 16, 128), (1, 32768, 16, 16, 128)),
    "ladder": tuple((1, 2**i, 8, 8, 64) for i in range(10, 15)),
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
    everybody = (*CONTESTANTS, "torch")
    cases = [
        (Case(name, dtype, *sizes, direction), everybody)
        for sizes in SHAPES[shapes]
        for name in MASKS
        for dtype in DTYPES
        for direction in DIRECTIONS
    ]
    return turns.choose(cases, only, cell)


def cell(contestant: str, case: Case) -> str:
    """Return the name of a cell."""
    size = "x".join(str(x) for x in (case.b, case.t, case.n, case.k, case.h))
    return f"{contestant}/{case.mask}/{case.dtype}/{size}/{case.direction}"


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
    with Torch(threads=os.cpu_count() or 1) as torch:
        return turns.resume(
            cases, path, FIELDS, cell, row_cell,
            lambda case, names: measure(case, names, torch, Protocol(budget=budget)),
            lambda case, rows: say(f"{cell('', case)[1:]}: {turns.times(rows)}"),
        )  # fmt: skip


def measure(
    case: Case,
    names: Sequence[str],
    torch: Torch,
    protocol: Protocol,
    contestants: Mapping[str, Callable[[Case], Function]] | None = None,
) -> list[dict[str, Any]]:
    """Measure contestants on one case, in turns.

    Args:
      case: what is computed.
      names: keys of `contestants`, or "torch".
      torch: the process of PyTorch.
      protocol: how often.
      contestants: by name; `CONTESTANTS` if None.

    Returns:
      One row for each name.
    """
    contestants = CONTESTANTS if contestants is None else contestants
    rows = {name: _blank(name, case) for name in names}
    runners = {}
    arrays = functools.cache(case.arrays)
    for name in names:
        make = (
            functools.partial(torch.prepare, case)
            if name == "torch"
            else functools.partial(_compile, contestants[name], case, arrays, rows[name])
        )
        runner = turns.prepare(make, rows[name])
        if runner is not None:
            runners[name] = runner
    turns.time_all(runners, rows, case.flops, protocol)
    return list(rows.values())


def _blank(name, case):
    empty = dict.fromkeys(FIELDS, "")
    device = jax.devices()[0]
    return {
        **empty,
        **dataclasses.asdict(case),
        "contestant": name,
        "area": case.area,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def _compile(contestant, case, arrays, row):
    """Compile a contestant; return a function that runs it once and returns the seconds."""
    attend = contestant(case)
    arrays = arrays()
    if hasattr(attend, "place"):
        # Where a contestant keeps its arrays between calls; moving them there is not its time.
        arrays = attend.place(arrays)
    *inputs, cotangent = arrays
    if case.direction == "backward":
        # What the forward pass leaves is an argument.
        out, pull = jax.jit(functools.partial(jax.vjp, attend))(*inputs)
        run = lambda pull, cotangent: pull(cotangent.astype(out.dtype))
        return turns.compiled(run, (pull, cotangent), row)
    if case.direction == "both":
        return turns.compiled(with_backward(attend), arrays, row)
    return turns.compiled(attend, inputs, row)


def row_cell(row: dict[str, Any]) -> str:
    """Return the name of the cell that a row belongs to."""
    numbers = {name: int(row[name]) for name in "btnkh"}
    case = Case(row["mask"], row["dtype"], direction=row["direction"], **numbers)
    return cell(row["contestant"], case)


def names(cases: Iterable[tuple[Case, Sequence[str]]]) -> list[str]:
    """Return the names of all cells."""
    return turns.cell_names(cases, cell)


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> bool:
    """Draw rows, see `draw_attention`."""
    return draw_attention(rows, path)


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
    lines += growth(rows)
    refusals = sorted({r["status"] for r in rows if r["status"].startswith("refused")})
    return "\n".join([*lines, *(f"  {text}" for text in refusals)])


def growth(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each contestant and case measured at three lengths or more.

    It says how well a straight line fits its time over the length, and the largest growth of its
    time and of its temporary memory, for each doubling of the length.
    """
    series: dict[str, dict[int, tuple[float, float]]] = {}
    for row in rows:
        if row["status"] == "ok" and row["temporary_bytes"] != "":
            sizes = "x".join(str(row[name]) for name in "bnkh")
            name = f"{row['contestant']}/{row['mask']}/{row['dtype']}/{sizes}/{row['direction']}"
            point = float(row["median_ms"]), max(1.0, float(row["temporary_bytes"]))
            series.setdefault(name, {})[int(row["t"])] = point
    lines = []
    for name, points in series.items():
        if len(points) < 3:
            continue
        lengths = sorted(points)
        times = [points[t][0] for t in lengths]
        fit = statistics.correlation(lengths, times) ** 2
        steepest = [
            max(
                (points[b][i] / points[a][i]) ** (1 / math.log2(b / a))
                for a, b in itertools.pairwise(lengths)
            )
            for i in (0, 1)
        ]
        lines.append(
            f"  {name} from {lengths[0]} to {lengths[-1]}: R^2 of time over length {fit:.4f}; "
            f"by doubling at most time x {steepest[0]:.2f}, memory x {steepest[1]:.2f}"
        )
    return lines
