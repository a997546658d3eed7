# SPDX-License-Identifier: Apache-2.0
"""Find the fastest tiles for a set of shapes and write them into a table, see `attnjax.ops.tuning`.

For every shape, dtype and kind of mask, candidates and the implementation's own rule run in turns,
forward and backward. An entry is written when a candidate beats the rule by more than chance.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from attnjax.benchmarks.attention import cell
from attnjax.benchmarks.contestants import Case, with_backward
from attnjax.errors import RecipeError
from attnjax.ops import attention
from attnjax.ops.tuning import TILES, Entry, Tuning, device_name, load, save
from attnjax.timing import alternate

KINDS = ("full", "causal")
"""Masks that stand for those without and with partially visible tiles."""

GAIN = 0.97
"""A candidate must take less than this multiple of the rule's time."""

RULE = "rule"


def candidates(implementation: str, case: Case) -> list[dict[str, Any]]:
    """Return tiles worth trying for a case.

    Args:
      implementation: key of `attnjax.ops.tuning.TILES`.
      case: the case.
    """
    if implementation == "chunked":
        heads = sorted({x for x in (1, 2, 4, 8, case.k) if case.k % x == 0})
        found = [
            {"queries": min(queries, case.t), "keys": min(keys, case.t), "heads": count}
            for queries in (256, 512, 1024)
            for keys in (256, 512, 1024, 2048)
            for count in heads
            if 2**19 <= queries * keys * count * (case.n // case.k) <= 2**20
        ]
    elif implementation == "pallas_tpu":
        found = [
            {"queries": queries, "keys": keys}
            for queries in (256, 512, 1024, 2048)
            for keys in (256, 512, 1024, 2048)
        ]
    else:
        found = [
            {
                "forward": forward, "backward": backward, "forward_warps": warps,
                "backward_warps": warps, "stages": stages,
            }
            for forward in ((64, 64), (128, 64), (128, 128))
            for backward in ((32, 32), (64, 64), (128, 64))
            for warps in (4, 8)
            for stages in (2, 3)
        ]  # fmt: skip
    unique = {tuple(tiles.items()): tiles for tiles in found}
    return list(unique.values())


def tune(
    cases: Iterable[tuple[Case, Sequence[str]]],
    path: pathlib.Path,
    *,
    budget: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[tuple[str, float, float, dict[str, Any]]]:
    """Measure candidates case by case and write the table after each.

    Args:
      cases: from `attnjax.benchmarks.attention.grid`; those whose mask is one of `KINDS` and whose
        direction is "both" are measured, for the named implementations that have tiles.
      path: JSON file of the table; entries it has of other cases are kept.
      budget: seconds of timing for each case and implementation.
      say: called with one line per case.

    Returns:
      For each case its name, the milliseconds of the rule and of the best, and the best tiles
      (empty where the rule is best).

    Raises:
      RecipeError: the file holds something else, or no case has anything to tune.
    """
    try:
        table = load(path) if path.exists() and path.stat().st_size else Tuning()
    except ValueError as error:
        raise RecipeError(str(error)) from error
    rows = []
    for case, names in cases:
        if case.mask not in KINDS or case.direction != "both":
            continue
        for name in names:
            if name not in TILES:
                continue
            label = cell(name, case).rpartition("/")[0]
            try:
                rule, best, entry = measure(name, case, budget)
            except NotImplementedError as refusal:
                say(f"{label}: refused: {refusal}")
                continue
            if entry is not None:
                table = table.merged([entry])
            save(table, path)
            rows.append((label, rule, best, {} if entry is None else dict(entry.tiles)))
            say(f"{label}: rule {rule:.2f} ms, best {best:.2f} ms")
    if not rows:
        raise RecipeError(f"nothing to tune: no case of {list(TILES)} that this device serves")
    return rows


def measure(implementation: str, case: Case, budget: float) -> tuple[float, float, Entry | None]:
    """Return milliseconds of the rule and of the best candidate, and its entry if that is better.

    Raises:
      NotImplementedError: the implementation refuses the case.
    """
    arrays = case.arrays()
    whole = Entry(
        implementation, device_name(), case.dtype, case.mask == "full", case.n, case.k, case.t,
        case.t, case.h, case.h, (), 0.0,
    )  # fmt: skip
    entries = {
        str(tiles): dataclasses.replace(whole, tiles=tuple(tiles.items()))
        for tiles in candidates(implementation, case)
    }
    runs = {RULE: _compiled(implementation, case, Tuning(), arrays)}
    for name, entry in entries.items():
        try:
            runs[name] = _compiled(implementation, case, Tuning((entry,)), arrays)
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError):
            # Too large for this device, or refused by the compiler: no candidate.
            continue
    timings = alternate(runs, rounds=40, warmup=1, budget=budget)
    times = {name: 1e3 * timing.median for name, timing in timings.items()}
    best = min(times, key=times.__getitem__)
    if best == RULE or times[best] > GAIN * times[RULE]:
        return times[RULE], times[RULE], None
    entry = dataclasses.replace(entries[best], milliseconds=round(times[best], 3))
    return times[RULE], times[best], entry


def _compiled(implementation, case, tuning, arrays):
    seen = case.make_mask()
    attend = functools.partial(attention, mask=seen, implementation=implementation, tuning=tuning)
    compiled = jax.jit(with_backward(attend)).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def render(rows: Sequence[tuple[str, float, float, dict[str, Any]]], path: pathlib.Path) -> str:
    """Return a text table of what `tune` returned, and how to use the file."""
    width = max(len(row[0]) for row in rows)
    lines = [f"{'ms':{width}}{'rule':>12}{'best':>12}  tiles"]
    for label, rule, best, tiles in rows:
        lines.append(f"{label:{width}}{rule:12.2f}{best:12.2f}  {tiles or 'those of the rule'}")
    lines.append(f"Use it: ATTNJAX_TUNING={path}, or attention(..., tuning=tuning.load(path)).")
    return "\n".join(lines)
