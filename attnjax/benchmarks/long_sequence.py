# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of token mixers over length, running out of memory included.

He and Kabic, "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
arXiv 2302.06218. Which mixers and lengths are measured, and how, is our design: of the paper only
the abstract and the nomenclature could be read.

A cell is one mixer at one length in one direction. Its status is ok, out of memory (caught, or
foreseen from what the compiled program asks for), slow (ten rounds would not fit the budget), or
refused with the reason. What is slow or does not fit is not tried at longer lengths. Results are
appended to a CSV file cell by cell, and cells that the file already holds are not measured again.
How accuracy depends on context is measured by training: `attnjax.train.context_sweep`.
"""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from attnjax.benchmarks import turns
from attnjax.benchmarks.figures import draw_mixers as draw
from attnjax.ops import mixers
from attnjax.timing import alternate

__all__ = ["CONTESTANTS", "FIELDS", "LENGTHS", "PAPER", "Cell", "available_bytes", "draw", "grid",
           "measure", "names", "render", "row_name", "run"]  # fmt: skip

PAPER = {
    "title": "A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
    "id": "arXiv:2302.06218",
    "year": 2023,
    "code": "no repository found",
    "licence": "none stated",
    "claim": "Longer context improves performance, depending on the application.",
}

CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "softmax_materialised": ("softmax", {"implementation": "reference"}),
    "kernel_linear": ("kernel", {"kernel": "linear"}),
    "kernel_polynomial": ("kernel", {"kernel": "polynomial"}),
    "linformer": ("linformer", {}),
    "nystrom": ("nystrom", {"landmarks": 64}),
    "window": ("window", {"window": 64}),
    "dilated": ("dilated", {"window": 16, "dilation": 8}),
    "global": ("global", {"window": 64}),
    "random": ("random", {"window": 64}),
    "block": ("block", {"block": 128}),
    "favor": ("favor", {}),
    "lsh": ("lsh", {"chunk": 64}),
    "fnet": ("fnet", {}),
    "gfnet": ("gfnet", {}),
    "afno": ("afno", {}),
    "mlp": ("mlp", {}),
    "convolution_short": ("convolution", {"kernel": 15}),
    "convolution": ("convolution", {}),
    "s4d": ("s4d", {}),
    "lru": ("lru", {}),
    "gated_recurrence": ("gated_recurrence", {}),
    "transformer_xl": ("transformer_xl", {"segment": 128}),
    "gaussian_process": ("gaussian_process", {}),
}
"""Name -> mixer and its options."""

LENGTHS = {
    "quick": tuple(2**i for i in range(8, 12)),
    "standard": tuple(2**i for i in range(10, 16)),
    "long": tuple(2**i for i in range(10, 21)),
}
"""Named sets of lengths."""

DIRECTIONS = ("forward", "both")
WARMUP, ROUNDS = 3, 10

FIELDS = (
    "mixer", "length", "dim", "heads", "direction", "status", "median_ms", "low_ms", "high_ms",
    "rounds", "gflops", "temporary_bytes", "activation_bytes", "compile_seconds", "device", "cores",
    "jax",
)  # fmt: skip
"""Columns of the CSV file; `gflops` and `activation_bytes` are what the mixer says it costs."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured: one example of the length, float32.

    Attributes:
      mixer: key of `CONTESTANTS`.
      length: tokens.
      direction: "forward", or "both" for the forward and the backward pass together.
      dim: model width.
      heads: heads.
    """

    mixer: str
    length: int
    direction: str
    dim: int = 128
    heads: int = 4

    @property
    def name(self) -> str:
        """Such as "window/4096/forward"."""
        return f"{self.mixer}/{self.length}/{self.direction}"


def grid(lengths: str, only: str = "") -> list[Cell]:
    """List the cells of a set of lengths, by mixer and direction from short to long.

    Args:
      lengths: key of `LENGTHS`.
      only: regular expression searched in cell names; empty for all.

    Raises:
      ValueError: the set is unknown, the expression is malformed, or nothing is left.
    """
    if lengths not in LENGTHS:
        raise ValueError(f"lengths {lengths!r} are unknown; choose from {list(LENGTHS)}")
    cells = [
        Cell(mixer, length, direction)
        for mixer in CONTESTANTS
        for direction in DIRECTIONS
        for length in LENGTHS[lengths]
    ]
    pattern = turns.matcher(only)
    chosen = [cell for cell in cells if pattern.search(cell.name)]
    if not chosen:
        raise ValueError(f"only={only!r} matches no cell such as {cells[0].name!r}")
    return chosen


def names(cells: Iterable[Cell]) -> list[str]:
    """Return the names of `grid`'s cells."""
    return [cell.name for cell in cells]


def run(
    cells: Iterable[Cell],
    path: pathlib.Path,
    *,
    budget: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure cells and append them to a CSV file.

    Args:
      cells: from `grid`.
      path: CSV file; cells it already holds are kept and skipped.
      budget: seconds that all rounds of a cell may take; beyond, the cell is slow.
      say: called with one line per cell.

    Returns:
      All rows of the file, old and new.
    """
    rows = turns.read(path, FIELDS)
    status = {row_name(row): row["status"] for row in rows}
    given_up: dict[tuple[str, str], str] = {}
    for cell in cells:
        series = (cell.mixer, cell.direction)
        if cell.name not in status:
            row = _blank(cell) | {"status": given_up.get(series, "")}
            if not row["status"]:
                row = measure(cell, budget)
            turns.append(path, FIELDS, [row])
            rows.append(row)
            status[cell.name] = row["status"]
            shown = f"{row['median_ms']} ms" if row["status"] == "ok" else row["status"]
            say(f"{cell.name}: {shown}")
        if status[cell.name] != "ok":
            given_up[series] = status[cell.name].split(" at ")[0] + f" at {cell.length}"
    return rows


def measure(cell: Cell, budget: float) -> dict[str, Any]:
    """Measure one cell: the median of ten rounds after three to warm up; return its row."""
    row = _blank(cell)
    name, options = CONTESTANTS[cell.mixer]
    try:
        mixer = mixers.make(name, **options)
        once = _compile(mixer, cell, row)
        begun = time.perf_counter()
        once()
        if (time.perf_counter() - begun) * (WARMUP + ROUNDS) > budget:
            return row | {"status": f"slow: {time.perf_counter() - begun:.2g} s"}
        timing = alternate({"cell": once}, rounds=ROUNDS, warmup=WARMUP, budget=math.inf)["cell"]
    except (NotImplementedError, ValueError) as refusal:
        return row | {"status": "refused: " + " ".join(str(refusal).split())}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"status": "out of memory"}
    except MemoryError:
        return row | {"status": "out of memory"}
    return row | {
        "status": "ok",
        "median_ms": round(1e3 * timing.median, 4),
        "low_ms": round(1e3 * timing.quantile(0.2), 4),
        "high_ms": round(1e3 * timing.quantile(0.8), 4),
        "rounds": len(timing.seconds),
    }


def _compile(mixer, cell, row):
    """Compile a cell and make its inputs; return a function that runs it and waits."""
    passes = 3.0 if cell.direction == "both" else 1.0
    sizes = (cell.length, cell.dim, cell.heads)
    row["gflops"] = round(passes * mixer.flops(*sizes) / 1e9, 4)
    row["activation_bytes"] = int(mixer.activation_bytes(*sizes))
    init = lambda key: mixer.init(key, *sizes)
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, cell.length, cell.dim), "float32")
    function = mixer.apply
    if cell.direction == "both":
        loss = lambda params, x: mixer.apply(params, x).sum()
        function = lambda params, x: jax.grad(loss, argnums=(0, 1))(params, x)
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(params, x).compile()
    row["compile_seconds"] = round(time.perf_counter() - begun, 2)
    memory = compiled.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    needed += memory.argument_size_in_bytes
    if needed > available_bytes():
        raise MemoryError(f"{cell.name} needs {needed:,} bytes")
    params = jax.jit(init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), x.shape)
    return lambda: jax.block_until_ready(compiled(params, x))


def available_bytes() -> int:
    """Return the memory that is free: the device's, or the machine's on CPU.

    A CPU would not refuse what does not fit: the process would be killed.
    """
    found = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if found and "bytes_limit" in found:
        return found["bytes_limit"] - found.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _blank(cell):
    return {
        **dict.fromkeys(FIELDS, ""),
        **dataclasses.asdict(cell),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def row_name(row: dict[str, Any]) -> str:
    """Return the name of the cell that a row belongs to."""
    return Cell(row["mixer"], int(row["length"]), row["direction"]).name


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return a text table: mixers and directions as lines, lengths as columns, milliseconds."""
    lengths = sorted({int(row["length"]) for row in rows})
    series: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        series.setdefault((row["mixer"], row["direction"]), {})[int(row["length"])] = row
    lines = [f"{'ms':30}" + "".join(f"{length:>12}" for length in lengths)]
    for (mixer, direction), found in series.items():
        cells = []
        for length in lengths:
            row = found.get(length)
            status = "" if row is None else row["status"]
            is_ok = status == "ok"
            text = f"{float(row['median_ms']):.2f}" if is_ok else status.partition(":")[0][:11]
            cells.append(f"{'OOM' if text.startswith('out of mem') else text:>12}")
        lines.append(f"{mixer + ' ' + direction:30}" + "".join(cells))
    refusals = sorted({r["status"] for r in rows if r["status"].startswith("refused")})
    return "\n".join([*lines, *(f"  {text}" for text in refusals)])
