# SPDX-License-Identifier: Apache-2.0
"""Cells of a benchmark: compile, run in turns, and keep what happened in a resumable CSV file.

A refusal or running out of memory is a value of its cell, not an end of the run.
"""

import csv
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.timing import Timing, alternate

OK, OUT_OF_MEMORY = "ok", "out of memory"
"""Statuses besides "refused: REASON"."""

Row = dict[str, Any]
Runner = Callable[[], float]
"""Runs once and returns its own seconds."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How often things run.

    Attributes:
      rounds: timed calls of each contestant, if the budget lasts.
      warmup: calls before, after the first one, which may compile.
      budget: seconds after which no further round starts.
      flush_bytes: memory that is written before every call, outside its time, so that no contestant
        finds its inputs in a cache; 0 for none.
    """

    rounds: int = 40
    warmup: int = 0
    budget: float = 10.0
    flush_bytes: int = 0


def matcher(only: str) -> re.Pattern[str]:
    """Compile the regular expression that is searched in names of cells; empty for all.

    Raises:
      ValueError: it is malformed.
    """
    try:
        return re.compile(only)
    except re.error as error:
        raise ValueError(f"only={only!r} is no regular expression: {error}") from error


def choose(
    cases: Iterable[tuple[Any, Sequence[str]]], only: str, cell: Callable[[str, Any], str]
) -> list[tuple[Any, list[str]]]:
    """Keep the cells whose names match.

    Args:
      cases: each with the names of its contestants.
      only: see `matcher`.
      cell: names a cell, from contestant and case.

    Returns:
      Cases with the contestants that are left, without those that have none.

    Raises:
      ValueError: the expression is malformed, or nothing is left.
    """
    cases, pattern = list(cases), matcher(only)
    kept = [(case, [x for x in names if pattern.search(cell(x, case))]) for case, names in cases]
    kept = [(case, names) for case, names in kept if names]
    if not kept:
        case, names = cases[0]
        raise ValueError(f"only={only!r} matches no cell such as {cell(names[0], case)!r}")
    return kept


def cell_names(
    cases: Iterable[tuple[Any, Sequence[str]]], cell: Callable[[str, Any], str]
) -> list[str]:
    """Return the names of all cells, see `choose`."""
    return [cell(name, case) for case, names in cases for name in names]


def resume(
    cases: Iterable[tuple[Any, Sequence[str]]],
    path: pathlib.Path,
    fields: Sequence[str],
    cell: Callable[[str, Any], str],
    row_cell: Callable[[Row], str],
    measure: Callable[[Any, list[str]], list[Row]],
    tell: Callable[[Any, list[Row]], None],
) -> list[Row]:
    """Measure the cells that a CSV file does not hold yet, and append them case by case.

    Args:
      cases: see `choose`.
      path: the file.
      fields: its columns.
      cell: names a cell, from contestant and case.
      row_cell: names the cell of a row.
      measure: returns one row for each missing contestant of a case.
      tell: called with a case and its new rows.

    Returns:
      All rows, old and new.

    Raises:
      ValueError: the file has other columns.
    """
    rows = read(path, fields)
    known = {row_cell(row) for row in rows}
    for case, names in cases:
        if missing := [name for name in names if cell(name, case) not in known]:
            fresh = measure(case, missing)
            append(path, fields, fresh)
            rows += fresh
            known |= {row_cell(row) for row in fresh}
            tell(case, fresh)
    return rows


def times(rows: Sequence[Row]) -> str:
    """Return who took how long, in words."""
    found = [f"{row['contestant']} {row['median_ms']} ms" for row in rows if row["status"] == OK]
    return ", ".join(found) or "everybody refused"


def prepare(make: Callable[[], Runner], row: Row) -> Runner | None:
    """Make a runner and run it once.

    Args:
      make: compiles; refuses with NotImplementedError or an ExceptionGroup of them.
      row: its "status" is set when there is no runner.

    Returns:
      The runner, or None when it was refused or ran out of memory.
    """
    ready = None
    try:
        runner = make()
        runner()
        ready = runner
    except* NotImplementedError as group:
        reasons = [" ".join(str(error).split()) for error in _leaves(group)]
        row["status"] = f"refused: {'; '.join(reasons)}"
    except* MemoryError:
        row["status"] = OUT_OF_MEMORY
    except* jax.errors.JaxRuntimeError as group:
        if not all("RESOURCE_EXHAUSTED" in str(error) for error in _leaves(group)):
            raise
        row["status"] = OUT_OF_MEMORY
    return ready


def _leaves(group):
    found = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def compiled(function: Callable, arguments: Sequence[Any], row: Row) -> Runner:
    """Compile a function and return a runner; fill in what the compiler says.

    Args:
      function: takes the arguments.
      arguments: arrays or trees of them.
      row: gets "compile_seconds", "temporary_bytes" and "peak_bytes" (of one device).

    Raises:
      MemoryError: the device has less memory than the program needs.
    """
    begun = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    row["compile_seconds"] = round(time.perf_counter() - begun, 2)
    memory = program.memory_analysis()
    row["temporary_bytes"] = memory.temp_size_in_bytes
    row["peak_bytes"] = (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    used = [x.sharding.device_set for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
    check_memory(row["peak_bytes"], len(set().union(*used)))

    def once():
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - begun

    return once


def check_memory(needed: float, devices: int = 1) -> None:
    """Raise MemoryError if devices have less memory than this many bytes on each of them."""
    device = jax.devices()[0]
    available = (device.memory_stats() or {}).get("bytes_limit", 0)
    if device.platform == "cpu":
        # Virtual devices share what there is.
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, devices)
    if available and needed > available:
        raise MemoryError(f"{needed:.0f} bytes are needed and {available} there")


def time_all(
    runners: Mapping[str, Runner], rows: Mapping[str, Row], flops: float, protocol: Protocol
) -> None:
    """Time runners in turns and fill in their rows.

    Args:
      runners: by name; already run once.
      rows: by the same names; each gets "status", "median_ms", "low_ms" and "high_ms" (quantiles
        0.2 and 0.8), "rounds" and "tflops".
      flops: operations of one call.
      protocol: how often.
    """
    if not runners:
        return
    flush = _flusher(protocol.flush_bytes)
    # A runner returns its own seconds, so that talking to another process does not count.
    own: dict[str, list[float]] = {name: [] for name in runners}

    def turn(name):
        flush()
        own[name].append(runners[name]())

    turns = {name: (lambda name=name: turn(name)) for name in runners}
    alternate(turns, rounds=protocol.rounds, warmup=protocol.warmup, budget=protocol.budget)
    for name in runners:
        seconds = Timing(tuple(own[name][protocol.warmup :]))
        rows[name].update(
            status=OK,
            median_ms=round(1e3 * seconds.median, 4),
            low_ms=round(1e3 * seconds.quantile(0.2), 4),
            high_ms=round(1e3 * seconds.quantile(0.8), 4),
            rounds=len(seconds.seconds),
            tflops=round(flops / seconds.median / 1e12, 4),
        )


def _flusher(size):
    if not size:
        return lambda: None
    buffer = jnp.zeros(size // 4, jnp.float32)
    write = jax.jit(lambda x: x + 1)
    return lambda: jax.block_until_ready(write(buffer))


def read(path: pathlib.Path, fields: Sequence[str]) -> list[Row]:
    """Return the rows of a CSV file; none when it does not exist.

    Raises:
      ValueError: the file has other columns.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(fields):
            raise ValueError(f"{path} has columns {reader.fieldnames}, expected {list(fields)}")
        return list(reader)


def append(path: pathlib.Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """Append rows to a CSV file, with a header if it is new; other keys of rows are left out."""
    is_new = not path.exists() or not path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
