# SPDX-License-Identifier: Apache-2.0
"""The scale factor of distributed attention, and what of it comes from tiling and from devices.

    scale factor = t(vanilla, one device) / t(distributed, P devices)
                 = t(vanilla) / t(tiled, one device)  *  t(tiled) / t(distributed)
                   from tiling                           from devices

Vanilla holds the scores; tiled is the same core without them; distributed runs it on all devices.
The same two factors are given for the longest sequence whose compiled program fits a limit of
memory per device. Only what was measured here is said: the "almost 40x with four RTX 4090" in the
abstract of arXiv 2302.06218 is not this benchmark's claim.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from attnjax.benchmarks import turns
from attnjax.benchmarks.contestants import MASKS, Function, with_backward
from attnjax.benchmarks.contestants import Case as Shape
from attnjax.ops import attention
from attnjax.parallel import distributed_attention, plan_distributed
from attnjax.timing import alternate

CONTESTANTS = ("vanilla", "tiled", "distributed")

# b, t, n, k, h; times are taken at every t, lengths searched from the first on.
SHAPES = {
    "quick": (2**26, ((1, 256, 2, 2, 16), (1, 512, 2, 2, 16))),
    "standard": (2**30, tuple((1, t, 8, 8, 64) for t in (1024, 2048, 4096))),
    "long": (2**33, tuple((1, t, 8, 8, 64) for t in (4096, 16384, 65536))),
}  # fmt: skip
"""Named sets: bytes that a program may take on one device, and shapes."""

LONGEST = 2**22
"""Where the search for the longest sequence ends."""
WARM_UPS, ROUNDS = 3, 10

FIELDS = (
    "contestant", "quantity", "mask", "dtype", "b", "t", "n", "k", "h", "direction", "limit_bytes",
    "status", "median_ms", "low_ms", "high_ms", "rounds", "difference", "device_bytes", "longest",
    "devices", "plan", "device", "cores", "jax",
)  # fmt: skip
"""Columns. `status` is ok, over the limit, out of memory, or (of a length) none fits or not ended.
`difference` is the largest one to vanilla's output; `device_bytes` are arguments, results and
temporaries of the program of one device."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
      quantity: "time" at this length, or "length": the longest, searched from this one.
      shape: the attention.
      limit_bytes: what a program may take on one device.
    """

    quantity: str
    shape: Shape
    limit_bytes: int


def grid(shapes: str, only: str = "") -> list[tuple[Case, list[str]]]:
    """List the cases of a set of shapes with the contestants of each.

    Args:
      shapes: key of `SHAPES`.
      only: regular expression searched in cell names; empty for all.

    Raises:
      ValueError: the set is unknown, the expression is malformed, or nothing is left.
    """
    if shapes not in SHAPES:
        raise ValueError(f"shapes {shapes!r} are unknown; choose from {list(SHAPES)}")
    limit, sizes = SHAPES[shapes]
    cases = []
    for direction in ("forward", "both"):
        settings = [Shape("full", "float32", *size, direction) for size in sizes]
        cases.append(Case("length", settings[0], limit))
        cases += [Case("time", shape, limit) for shape in settings]
    return turns.choose([(case, CONTESTANTS) for case in cases], only, cell)


def cell(contestant: str, case: Case) -> str:
    """Return the name of a cell."""
    shape = case.shape
    size = "x".join(str(x) for x in (shape.b, shape.t, shape.n, shape.k, shape.h))
    return f"{contestant}/{case.quantity}/{shape.mask}/{shape.dtype}/{size}/{shape.direction}"


def run(
    cases: Iterable[tuple[Case, Sequence[str]]],
    path: pathlib.Path,
    *,
    budget: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure cells and append them to a CSV file; cells it already holds are skipped.

    Args:
      cases: from `grid`.
      path: CSV file.
      budget: seconds of timing per case, after the warm-up; at least three rounds are timed.
      say: called with one line per case.

    Returns:
      All rows of the file, old and new.

    Raises:
      ValueError: the file has other columns.
    """

    def measure(case, names):
        if case.quantity == "length":
            return find_longest(case, names)
        return measure_time(case, names, budget)

    def tell(case, rows):
        found = ", ".join(f"{row['contestant']} {_show(row)}" for row in rows)
        say(f"{cell('', case)[1:]}: {found}")

    return turns.resume(cases, path, FIELDS, cell, row_cell, measure, tell)


def measure_time(case: Case, names: Sequence[str], budget: float) -> list[dict[str, Any]]:
    """Time contestants in turns; those whose program exceeds the limit are not run."""
    rows = {name: _blank(name, case) for name in names}
    arrays = case.shape.arrays()
    runners, outputs = {}, {}
    for name in names:
        row = rows[name]
        try:
            compiled = _compile(name, case.shape, row)
            if row["device_bytes"] > case.limit_bytes:
                row["status"] = "over the limit"
                continue
            arguments, _ = compiled.input_shardings
            placed = jax.device_put(_arguments(arrays, case.shape), tuple(arguments))
            out = jax.block_until_ready(compiled(*placed))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["status"] = "out of memory"
            continue
        outputs[name] = np.asarray(out[0] if case.shape.direction == "both" else out)
        runners[name] = functools.partial(_once, compiled, placed)
    if not runners:
        return list(rows.values())
    timings = alternate(runners, rounds=ROUNDS, warmup=WARM_UPS, budget=budget)
    for name, timing in timings.items():
        difference = ""
        if "vanilla" in outputs:
            difference = float(np.abs(outputs[name] - outputs["vanilla"]).max())
        rows[name] |= {
            "status": "ok",
            "median_ms": round(1e3 * timing.median, 4),
            "low_ms": round(1e3 * timing.quantile(0.2), 4),
            "high_ms": round(1e3 * timing.quantile(0.8), 4),
            "rounds": len(timing.seconds),
            "difference": difference,
        }
    return list(rows.values())


def find_longest(case: Case, names: Sequence[str]) -> list[dict[str, Any]]:
    """Search the longest sequence whose compiled program keeps the limit; nothing is run.

    The length doubles until it does not fit and is then refined to an eighth of itself.
    """
    rows = []
    for name in names:
        row = _blank(name, case)
        row["status"] = "none fits"
        length = case.shape.t
        while length <= LONGEST and _fits(name, case, length, row):
            length *= 2
        if length > LONGEST:
            row["status"] = "not ended"
        elif row["longest"]:
            start = row["longest"]
            fits, exceeds = 8, 16
            while exceeds - fits > 1:
                middle = (fits + exceeds) // 2
                is_less = _fits(name, case, start * middle // 8, row)
                fits, exceeds = (middle, exceeds) if is_less else (fits, middle)
        rows.append(row)
    return rows


def _fits(name, case, length, row):
    trial: dict[str, Any] = {}
    _compile(name, dataclasses.replace(case.shape, t=length), trial)
    if trial["device_bytes"] > case.limit_bytes:
        return False
    row |= {**trial, "longest": length, "status": "ok"}
    return True


def attend(name: str, shape: Shape) -> tuple[Function, str]:
    """Return what a contestant computes from query, key and value, and its plan in words."""
    seen = MASKS[shape.mask](shape.t)
    if name != "distributed":
        core = {"vanilla": "reference", "tiled": "chunked"}[name]
        return lambda q, k, v: attention(q, k, v, mask=seen, implementation=core), ""
    sizes = (shape.b, shape.n, shape.k, shape.t, shape.t, shape.h)
    plan = plan_distributed(*sizes, jax.device_count(), np.dtype(shape.dtype).itemsize)
    function = lambda q, k, v: distributed_attention(
        q, k, v, seen, plan=plan, implementation="chunked"
    )
    return function, "x".join(str(ways) for ways in plan.shape)


def _compile(name, shape, row):
    function, row["plan"] = attend(name, shape)
    if shape.direction == "both":
        function = with_backward(function)
    abstract = jax.eval_shape(lambda: _arguments(shape.arrays(), shape))
    compiled = jax.jit(function).lower(*abstract).compile()
    memory = compiled.memory_analysis()
    row["device_bytes"] = (
        memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    )
    return compiled


def _arguments(arrays, shape):
    return tuple(arrays if shape.direction == "both" else arrays[:3])


def _once(compiled, arguments):
    jax.block_until_ready(compiled(*arguments))


def _blank(name, case):
    return {
        **dict.fromkeys(FIELDS, ""),
        **dataclasses.asdict(case.shape),
        "contestant": name,
        "quantity": case.quantity,
        "limit_bytes": case.limit_bytes,
        "devices": jax.device_count() if name == "distributed" else 1,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def row_cell(row: dict[str, Any]) -> str:
    """Return the name of the cell that a row belongs to."""
    sizes = {name: int(row[name]) for name in "btnkh"}
    shape = Shape(row["mask"], row["dtype"], direction=row["direction"], **sizes)
    return cell(row["contestant"], Case(row["quantity"], shape, int(row["limit_bytes"])))


def names(cases: Iterable[tuple[Case, Sequence[str]]]) -> list[str]:
    """Return the names of all cells."""
    return turns.cell_names(cases, cell)


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> bool:
    """Draw nothing: the table says it all."""
    del rows, path
    return False


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the text table: one line per case, both factors and their product, and notes."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row_cell(row).partition("/")[2], {})[row["contestant"]] = row
    width = max([len(name) for name in cases] + [4])
    columns = (*CONTESTANTS, "tiling", "devices", "factor")
    lines = [f"{'':{width}}" + "".join(f"{name:>14}" for name in columns)]
    for name, found in cases.items():
        texts = [_show(found[c]) if c in found else "" for c in CONTESTANTS]
        vanilla, tiled, distributed = (_number(found.get(c)) for c in CONTESTANTS)
        # A longer time is worse, a longer sequence better.
        swap = name.startswith("length")
        for one, two in ((vanilla, tiled), (tiled, distributed), (vanilla, distributed)):
            one, two = (two, one) if swap else (one, two)
            texts.append("" if one is None or two is None else f"{one / two:.2f}x")
        lines.append(f"{name:{width}}" + "".join(f"{text:>14}" for text in texts))
    return "\n".join([*lines, *_notes(rows)])


def _show(row):
    value = _number(row)
    if value is None:
        return row["status"]
    return f"{value:.0f} tokens" if row["quantity"] == "length" else f"{value:.2f} ms"


def _number(row):
    if row is None or row["status"] not in ("ok", "not ended"):
        return None
    return float(row["longest"] if row["quantity"] == "length" else row["median_ms"])


def _notes(rows):
    notes = []
    for device, cores in sorted({(row["device"], str(row["cores"])) for row in rows}):
        here = [row for row in rows if (row["device"], str(row["cores"])) == (device, cores)]
        count = max(int(row["devices"]) for row in here)
        notes.append(f"{device}, {cores} cores; distributed over {count} devices.")
        if device.lower() == "cpu" and count > 1:
            notes.append(
                f"These {count} virtual devices share {cores} cores and one memory: their factor "
                "shows overhead, not what real devices would gain."
            )
    limits = sorted({int(row["limit_bytes"]) for row in rows})
    notes.append(
        "Lengths: the longest sequence, to an eighth, whose compiled program takes at most "
        f"{' or '.join(f'{limit / 2**20:g}' for limit in limits)} MiB per device by its own "
        "account; not run."
    )
    differences = [float(row["difference"]) for row in rows if row["difference"] not in ("", None)]
    if differences:
        notes.append(f"Largest difference to vanilla's output: {max(differences):.1e}.")
    notes.append("Nothing but these numbers is claimed; no published factor is reproduced here.")
    return notes
