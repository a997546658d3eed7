# SPDX-License-Identifier: Apache-2.0
"""Cost over length: efficiency lengths, growth, the length where softmax attention is overtaken.

    softmax: a L^2 + b L + c,  method: d L + e  (least squares)
    efficiency length: the larger root of a L^2 + (b - d) L + (c - e) = 0

Zhang et al., arXiv 2210.07661, Section 4.2: from there on the method is cheaper. Lengths are timed
in turns, so that a busy machine bends no line.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.benchmarks import turns
from attnjax.ops import efficient

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
"""Of the published sheet."""

SHEET = {
    "time_ms": {
        "softmax": (0.472, 0.628, 0.721, 0.981, 3.67, 18.437),
        "abc": (0.648, 0.590, 0.602, 0.910, 1.006, 1.509),
    },
    "memory_mb": {
        "softmax": (81, 265, 952, 3604, 14_020, 55_300),
        "abc": (42, 80, 156, 308, 612, 1220),
    },
}
"""The sheet that is published with the reference code; A100, batch 4, width 512, 8 heads."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A polynomial through costs.

    Attributes:
      coefficients: from the highest power to the constant.
      r2: share of the variance that it explains.
    """

    coefficients: tuple[float, ...]
    r2: float


def fit(lengths: Sequence[float], costs: Sequence[float], degree: int) -> Fit:
    """Fit a polynomial by least squares.

    Args:
      lengths: at least degree + 1 different ones.
      costs: as many, finite.
      degree: 1 for a line, 2 for a parabola.

    Raises:
      ValueError: numbers differ, are too few or not finite.
    """
    x, y = np.asarray(lengths, float), np.asarray(costs, float)
    if x.shape != y.shape or len(set(x)) <= degree or not np.isfinite(y).all():
        raise ValueError(f"degree {degree} does not fit lengths {lengths} and costs {costs}")
    scale = x.max()
    found = np.polyfit(x / scale, y, degree)
    rest = y - np.polyval(found, x / scale)
    spread = ((y - y.mean()) ** 2).sum()
    r2 = 1 - (rest**2).sum() / spread if spread else 1.0
    powers = scale ** np.arange(degree, -1, -1)
    return Fit(tuple(float(c) for c in found / powers), float(r2))


def efficiency_length(
    lengths: Sequence[float], softmax: Sequence[float], costs: Sequence[float], skip: int = 0
) -> tuple[float, float]:
    """Return the length from which a method costs less than softmax attention.

    Args:
      lengths: at which both were measured.
      softmax: its costs, fitted by a parabola.
      costs: the method's, fitted by a line.
      skip: so many of the shortest lengths are left out of the line; 1 for time, as published.

    Returns:
      The length (NaN where the curves do not meet) and the R^2 of the line.
    """
    a, b, c = fit(lengths, softmax, 2).coefficients
    line = fit(lengths[skip:], costs[skip:], 1)
    d, e = line.coefficients
    inside = (b - d) ** 2 - 4 * a * (c - e)
    if inside < 0 or a <= 0:
        return math.nan, line.r2
    return (d - b + math.sqrt(inside)) / (2 * a), line.r2


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attention at one length: forward pass, or forward and backward pass.

    Attributes:
      attention: name in `ops.efficient.ATTENTIONS`.
      pattern: member of `ops.efficient.PATTERNS`.
      length: tokens, of queries and keys.
      direction: "forward" or "both".
      batch, dim, heads: sizes.
    """

    attention: str
    pattern: str
    length: int
    direction: str = "forward"
    batch: int = 1
    dim: int = 128
    heads: int = 4

    @property
    def name(self) -> str:
        """Such as "abc/causal_self/4096/forward"."""
        return f"{self.attention}/{self.pattern}/{self.length}/{self.direction}"


GRIDS: dict[str, dict[str, Any]] = {
    "ladder_quick": {"lengths": (256, 512, 1024)},
    "ladder": {"lengths": tuple(2**i for i in range(10, 16))},
    "efficiency": {"lengths": LENGTHS, "batch": 4, "dim": 512, "heads": 8},
}
"""Name -> lengths and sizes; `efficiency` is the published setting."""

FIELDS = (
    *(field.name for field in dataclasses.fields(Cell)), "status", "median_ms", "low_ms", "high_ms",
    "rounds", "temporary_bytes", "peak_bytes", "compile_seconds", "device", "cores", "jax",
)  # fmt: skip
"""Columns of the CSV file."""


def grid(name: str, only: str = "") -> list[tuple[Cell, ...]]:
    """List series of cells: one attention in one pattern at all lengths.

    Args:
      name: key of `GRIDS`.
      only: regular expression searched in names of cells.

    Raises:
      ValueError: the name is unknown, or nothing is left.
    """
    if name not in GRIDS:
        raise ValueError(f"grid {name!r} is unknown; choose from {list(GRIDS)}")
    sizes = dict(GRIDS[name])
    lengths = sizes.pop("lengths")
    pattern_of = turns.matcher(only)
    series = []
    for attention, family in efficient.ATTENTIONS.items():
        for pattern in efficient.PATTERNS:
            if pattern not in family.patterns:
                continue
            cells = [Cell(attention, pattern, length, **sizes) for length in lengths]
            if kept := tuple(cell for cell in cells if pattern_of.search(cell.name)):
                series.append(kept)
    if not series:
        raise ValueError(f"only={only!r} matches no cell such as 'abc/causal_self/{lengths[0]}'")
    return series


def run(
    series: Iterable[tuple[Cell, ...]],
    path: pathlib.Path,
    *,
    budget: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure series that a CSV file does not hold yet, lengths in turns, and append them.

    Args:
      series: from `grid`.
      path: the file.
      budget: seconds for each series, besides compiling; at least three rounds are timed.
      say: called with one line per series.

    Returns:
      All rows, old and new.
    """

    def tell(cells, fresh):
        shown = ", ".join(f"{row['length']}: {row['median_ms']} ms" for row in fresh)
        say(f"{cells[0].attention} {cells[0].pattern}: {shown}")

    return turns.resume(
        [(cells, [cell.name for cell in cells]) for cells in series],
        path,
        FIELDS,
        cell=lambda name, cells: name,
        row_cell=row_name,
        measure=lambda cells, missing: measure([c for c in cells if c.name in missing], budget),
        tell=tell,
    )


def measure(cells: Sequence[Cell], budget: float) -> list[dict[str, Any]]:
    """Measure cells in turns; return their rows."""
    rows = {cell.name: _blank(cell) for cell in cells}
    runners = {}
    for cell in cells:
        runner = turns.prepare(lambda cell=cell: _runner(cell, rows[cell.name]), rows[cell.name])
        if runner is not None:
            runners[cell.name] = runner
    protocol = turns.Protocol(rounds=30, warmup=1, budget=budget)
    turns.time_all(runners, rows, 0.0, protocol)
    return list(rows.values())


def _runner(cell, row):
    causal, _, cross = cell.pattern.partition("_")
    attention = efficient.make(cell.attention, causal=causal == "causal", cross=cross == "cross")
    params = attention.init(jax.random.key(0), cell.dim, cell.heads)
    shape = (cell.batch, cell.length, cell.dim)
    x = jax.random.normal(jax.random.key(1), shape)
    context = jax.random.normal(jax.random.key(2), shape) if attention.cross else None
    function = attention.apply
    if cell.direction == "both":
        loss = lambda *arrays: jnp.sum(attention.apply(*arrays))
        function = lambda *arrays: jax.grad(loss, argnums=(0, 1))(*arrays)
    arguments = (params, x) if context is None else (params, x, context)
    return turns.compiled(function, arguments, row)


def _blank(cell):
    return {
        **dict.fromkeys(FIELDS, ""),
        **dataclasses.asdict(cell),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def row_name(row: Mapping[str, Any]) -> str:
    """Return the name of the cell that a row belongs to."""
    return Cell(row["attention"], row["pattern"], int(row["length"]), row["direction"]).name


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for every attention and pattern how its cost grows and when it overtakes softmax.

    Args:
      rows: of `run`.

    Returns:
      Dicts of `attention`, `pattern`, `time_r2` and `memory_r2` (of a line), `time_slope` (of
      logarithms over the upper half of lengths), `crossover` and `memory_crossover` (efficiency
      lengths against softmax attention of the same pattern; NaN for itself or without softmax, and
      where the fitted curves never meet), and `overtakes`, see there, or None.
    """
    series: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == turns.OK:
            key = (row["attention"], row["pattern"])
            series.setdefault(key, {})[int(row["length"])] = row
    found = []
    for (attention, pattern), by_length in series.items():
        lengths = sorted(by_length)
        if len(lengths) < 3:
            continue
        of = lambda rows, column: [float(rows[n][column]) for n in lengths]
        times, bytes_ = (of(by_length, c) for c in ("median_ms", "temporary_bytes"))
        softmax = series.get(("softmax", pattern), {})
        is_fair = attention != "softmax" and all(n in softmax for n in lengths)
        upper = len(lengths) // 2
        ratio = np.polyfit(np.log(lengths[upper:]), np.log(times[upper:]), 1)[0]
        record = {
            "attention": attention,
            "pattern": pattern,
            "time_r2": fit(lengths, times, 1).r2,
            "memory_r2": fit(lengths, bytes_, 1).r2,
            "time_slope": float(ratio),
            "crossover": math.nan,
            "memory_crossover": math.nan,
            "overtakes": None,
        }
        if is_fair:
            record["crossover"], _ = efficiency_length(
                lengths, of(softmax, "median_ms"), times, skip=1
            )
            record["overtakes"] = overtakes(lengths, of(softmax, "median_ms"), times)
            record["memory_crossover"], _ = efficiency_length(
                lengths, of(softmax, "temporary_bytes"), bytes_
            )
        found.append(record)
    return found


def overtakes(
    lengths: Sequence[int], baseline: Sequence[float], times: Sequence[float]
) -> tuple[float, float]:
    """Return the measured lengths between which times fall below a baseline for good.

    (0, first length) where they are below it everywhere, (last length, infinity) where they are not
    below it at the end.
    """
    behind = [i for i, (b, t) in enumerate(zip(baseline, times, strict=True)) if t >= b]
    last = behind[-1] if behind else -1
    edges = [0.0, *map(float, lengths), math.inf]
    return edges[last + 1], edges[last + 2]


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a text table: milliseconds by length, growth, fitted and measured crossover."""
    lengths = sorted({int(row["length"]) for row in rows})
    by_name = {row_name(row): row for row in rows}
    head = f"{'ms':32}" + "".join(f"{length:>10}" for length in lengths)
    lines = [head + f"{'R2 time':>9}{'R2 mem':>8}{'slope':>7}{'crossover':>11}{'measured':>13}"]
    for record in summarise(rows):
        cells = []
        for length in lengths:
            row = by_name.get(Cell(record["attention"], record["pattern"], length).name)
            is_ok = row is not None and row["status"] == turns.OK
            cells.append(f"{float(row['median_ms']):10.2f}" if is_ok else f"{'-':>10}")
        crossover = record["crossover"]
        shown = "-" if math.isnan(crossover) else f"{crossover:.0f}"
        lines.append(
            f"{record['attention'] + ' ' + record['pattern']:32}" + "".join(cells)
            + f"{record['time_r2']:9.4f}{record['memory_r2']:8.4f}{record['time_slope']:7.2f}"
            + f"{shown:>11}{_between(record['overtakes']):>13}"
        )  # fmt: skip
    return "\n".join(lines)


def _between(lengths):
    if lengths is None:
        return "-"
    low, high = lengths
    if not low:
        return f"<{high:.0f}"
    return f">{low:.0f}" if math.isinf(high) else f"{low:.0f}-{high:.0f}"


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> bool:
    """Draw time and temporary memory over length, one column of panels per pattern; PNG."""
    rows = [row for row in rows if row["status"] == turns.OK]
    if not rows:
        return False
    import matplotlib.figure

    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    names = list(dict.fromkeys(row["attention"] for row in rows))
    figure = matplotlib.figure.Figure((3.2 * len(patterns) + 1.6, 5.2), layout="constrained")
    grid_ = figure.subplots(2, len(patterns), squeeze=False, sharex=True)
    for column, pattern in enumerate(patterns):
        for line, (key, title, factor) in enumerate(
            (("median_ms", "ms", 1.0), ("temporary_bytes", "temporary MiB", 2.0**-20))
        ):
            axes = grid_[line][column]
            for i, name in enumerate(names):
                points = sorted(
                    (int(r["length"]), factor * float(r[key]))
                    for r in rows
                    if r["attention"] == name and r["pattern"] == pattern
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2,
                        color=f"C{i}", label=name,
                    )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{pattern.replace('_', ' ')}: {title}", fontsize=9)
            axes.tick_params(labelsize=8)
    shown: dict[str, Any] = {}
    for axes in grid_.flat:
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
