# SPDX-License-Identifier: Apache-2.0
"""Run a grid: tables of cells and of placements, the paper's own table, pictures.

In the folder of results

    results.csv     one row per cell, appended case by case; what it holds is not measured again
    balance.csv     one row per mask and placement, likewise
    summary/*.csv   the paper's columns, means over drawn masks, one file per size; written anew
    speed_*.png     TFLOP/s against length, one panel per mask; balance.png the placements

One program drives all devices, so that every rank has the same time and both ways to count speed
(summed over ranks, or of the slowest) agree: `tflops` is that of one device.
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attnjax.benchmarks import attention, turns
from attnjax.benchmarks.contestants import Torch
from attnjax.benchmarks.figures import draw_balance, draw_speed
from attnjax.benchmarks.long_context import layouts
from attnjax.benchmarks.long_context.balance import balance
from attnjax.benchmarks.long_context.cases import LongCase
from attnjax.benchmarks.long_context.grid import cell, grid, placements
from attnjax.benchmarks.long_context.kernels import KERNELS, METHODS
from attnjax.benchmarks.long_context.metrics import WORKLOADS, mean_of, per_device_tflops
from attnjax.benchmarks.turns import OK

FIELDS = (
    "contestant", "devices", "ulysses", "ring", "mask", "draw", "dtype", "t", "n", "k", "h",
    "direction", "status", "median_ms", "low_ms", "high_ms", "rounds", "tflops", "area",
    "temporary_bytes", "peak_bytes", "compile_seconds", "device", "cores", "jax",
)  # fmt: skip
"""Columns of results.csv; `status` is ok, refused: REASON, or out of memory."""

BALANCE_FIELDS = (
    "placement", "devices", "t", "mask", "draw", "status", "max_over_mean", "max_over_total",
    "entropy", "gini", "remote_max_over_mean", "remote_max_over_total", "remote_entropy",
    "remote_gini", "remote_fraction", "forward_seconds", "backward_seconds",
)  # fmt: skip
"""Columns of balance.csv; see `balance.Balance`."""

SUMMARY_FIELDS = (
    "baseline", "masktype", "world_size", "wd", "ulysses", "ring", "mean_tflops", "mean_peak_mems",
)  # fmt: skip
"""Columns of the paper's tables. Speed is of one device, memory in bytes of one device; -1000
stands for out of memory and -1 for not supported."""

__all__ = ["FIELDS", "cell", "draw", "grid", "names", "render", "run"]


def run(
    cases: Iterable[tuple[LongCase, Sequence[str]]],
    path: pathlib.Path,
    *,
    budget: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure cells and placements, and write the tables beside `path`.

    Args:
      cases: from `grid`.
      path: the table of cells.
      budget: seconds of timing per case, if its protocol does not have fewer.
      say: called with one line per case.

    Returns:
      All rows of the table of cells, old and new.
    """
    cases = list(cases)
    with Torch(threads=os.cpu_count() or 1) as torch:
        rows = turns.resume(
            cases, path, FIELDS, cell, row_cell,
            lambda case, names: measure(case, names, torch, budget),
            lambda case, rows: say(f"{cell('', case)}: {turns.times(rows)}"),
        )  # fmt: skip
    _run_balance(placements(cases), path.with_name("balance.csv"), say)
    write_summary(rows, path.parent / "summary")
    return rows


def measure(
    case: LongCase, names: Sequence[str], torch: Torch, budget: float
) -> list[dict[str, Any]]:
    """Measure contestants on one case, in turns, and return one row for each."""
    contestants = KERNELS if case.devices == 1 else METHODS
    protocol = dataclasses.replace(case.protocol, budget=min(budget, case.protocol.budget))
    rows = attention.measure(case, names, torch, protocol, contestants)
    for row in rows:
        row.update({"mask": case.label, "peak_bytes": row.get("peak_bytes", "")})
        name = row["contestant"]
        row["ulysses"], row["ring"] = (
            (1, 1) if case.devices == 1 else layouts.degrees(name, case.devices, case.n)
        )
        if row["status"] == OK:
            times = [row["median_ms"]] * case.devices
            row["tflops"] = round(per_device_tflops(case.flops, times), 6)
    return rows


def row_cell(row: dict[str, Any]) -> str:
    """Return the name of the cell that a row belongs to."""
    size = "x".join(str(row[name]) for name in "tnkh")
    parts = (row["mask"], row["dtype"], size, row["direction"], str(row["draw"]))
    return "/".join((f"{row['contestant']}@{row['devices']}", *parts))


def _run_balance(cases, path, say):
    rows = turns.read(path, BALANCE_FIELDS)
    key = lambda row: tuple(str(row[x]) for x in ("placement", "devices", "t", "mask", "draw"))
    known = {key(row) for row in rows}
    for case in cases:
        fresh = []
        for name in layouts.PLACEMENTS:
            row = {"placement": name, "mask": case.label} | {
                field: getattr(case, field) for field in ("devices", "t", "draw")
            }
            if key(row) in known:
                continue
            known.add(key(row))
            fresh.append(row | _balance_of(case, name))
        if fresh:
            turns.append(path, BALANCE_FIELDS, fresh)
            found = [r for r in fresh if r["status"] == OK]
            spreads = ", ".join(f"{r['placement']} {r['max_over_mean']}" for r in found)
            say(f"balance of {case.label} on {case.devices}: {spreads}")


def _balance_of(case, name):
    try:
        positions = layouts.place(name, case.drawn, case.devices)
    except (ValueError, NotImplementedError) as refusal:
        return {"status": f"refused: {' '.join(str(refusal).split())}"}
    found = balance(case.make_mask(), case.t, positions)
    digits = lambda values, prefix="": {f"{prefix}{k}": f"{v:.6g}" for k, v in values.items()}
    return {
        "status": OK,
        **digits(dataclasses.asdict(found.area)),
        **digits(dataclasses.asdict(found.remote), "remote_"),
        **digits(
            {
                name: getattr(found, name)
                for name in ("remote_fraction", "forward_seconds", "backward_seconds")
            }
        ),
    }


def write_summary(rows: Sequence[dict[str, Any]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write the paper's tables: means over drawn masks, one file per size.

    The paper's columns say neither length nor heads nor dtype. Lengths follow from the devices,
    at a constant number of tokens for each; the others, and that number, name the file.

    Args:
      rows: of the table of cells.
      folder: where to write; files of the same names are replaced.

    Returns:
      The files.
    """
    files: dict[str, dict[tuple, list[dict[str, Any]]]] = {}
    for row in rows:
        tokens = int(row["t"]) // int(row["devices"])
        name = "x".join(str(x) for x in (tokens, row["n"], row["k"], row["h"]))
        key = (
            row["contestant"], row["mask"], int(row["devices"]), WORKLOADS[row["direction"]],
            int(row["ulysses"]), int(row["ring"]),
        )  # fmt: skip
        files.setdefault(f"{name}-{row['dtype']}.csv", {}).setdefault(key, []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for name, groups in files.items():
        part = folder / f"{name}.part"
        with part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(SUMMARY_FIELDS)
            for key, group in groups.items():
                statuses = [row["status"] for row in group]
                speed, memory = (
                    mean_of(statuses, [row[field] for row in group])
                    for field in ("tflops", "peak_bytes")
                )
                writer.writerow((*key, f"{speed:.6g}", f"{memory:.0f}"))
        part.replace(folder / name)
    return [folder / name for name in files]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return a text table of GFLOP/s: one line per mask, size and direction; mean over draws."""
    lines: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        _, rest = row_cell(row).split("/", 1)
        line = f"@{row['devices']} {rest.rpartition('/')[0]}"
        lines.setdefault(line, {}).setdefault(row["contestant"], []).append(row)
    names = list(dict.fromkeys(row["contestant"] for row in rows if row["status"] == OK))
    width = max([len(line) for line in lines] + [8])
    text = [f"{'GFLOP/s':{width}}" + "".join(f"{name:>13}" for name in names)]
    for line, found in lines.items():
        cells = []
        for name in names:
            group = found.get(name, [])
            statuses = [row["status"] for row in group]
            if OK in statuses:
                cells.append(f"{1e3 * mean_of(statuses, [row['tflops'] for row in group]):13.2f}")
            else:
                cells.append(f"{statuses[0].partition(':')[0] if statuses else '':>13}")
        text.append(f"{line:{width}}" + "".join(cells))
    refusals = sorted({r["status"] for r in rows if r["status"].startswith("refused")})
    return "\n".join([*text, *(f"  {reason}" for reason in refusals)])


def names(cases: Iterable[tuple[LongCase, Sequence[str]]]) -> list[str]:
    """Return the names of all cells."""
    return turns.cell_names(cases, cell)


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> list[pathlib.Path]:
    """Draw speed for each direction, and the table of placements.

    Args:
      rows: of the table of cells.
      path: any file in the folder where to write, and where balance.csv lies.

    Returns:
      The files.
    """
    folder, files = path.parent, []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        picture = folder / f"speed_{direction}.png"
        if draw_speed(_points(rows, direction), picture):
            files.append(picture)
    spreads = turns.read(folder / "balance.csv", BALANCE_FIELDS)
    if draw_balance(spreads, folder / "balance.png"):
        files.append(folder / "balance.png")
    return files


def _points(rows, direction):
    """Means over draws, as `draw_speed` takes them: one line per contestant, heads and dtype."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row["direction"] == direction and row["status"] == OK:
            label = f"{row['contestant']} {row['n']}:{row['k']}x{row['h']} {row['dtype']}"
            groups.setdefault((row["mask"], label, int(row["t"])), []).append(row)
    return [
        (*key, mean_of([OK] * len(group), [row["tflops"] for row in group]))
        for key, group in groups.items()
    ]
