# SPDX-License-Identifier: Apache-2.0
"""Pictures of benchmark results."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any


def draw_attention(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> bool:
    """Draw achieved speed over the mask's area, one panel per mask and direction.

    Args:
      rows: rows of the attention benchmark.
      path: PNG file to write.

    Returns:
      Whether there was anything to draw.
    """
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return False
    import matplotlib.figure

    masks = list(dict.fromkeys(row["mask"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure = matplotlib.figure.Figure(
        (3.2 * len(masks) + 1.5, 2.6 * len(directions) + 0.6), layout="constrained"
    )
    grid = figure.subplots(len(directions), len(masks), squeeze=False, sharex=True)
    for line, direction in zip(grid, directions, strict=True):
        for axes, mask in zip(line, masks, strict=True):
            axes.set_title(f"{mask}, {direction}", fontsize=9)
            chosen = [r for r in rows if r["mask"] == mask and r["direction"] == direction]
            for i, name in enumerate(names):
                for dtype, style in (("float32", "-"), ("bfloat16", ":")):
                    points = sorted(
                        (int(r["t"]), 1e3 * float(r["tflops"]))
                        for r in chosen
                        if r["contestant"] == name and r["dtype"] == dtype
                    )
                    if points:
                        label = name if dtype == "float32" else None
                        axes.plot(
                            *zip(*points, strict=True), style, marker="o", markersize=3,
                            color=f"C{i}", label=label, linewidth=1.2,
                        )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.tick_params(labelsize=8)
            axes.set_ylim(bottom=0)
        line[0].set_ylabel("GFLOP/s", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("tokens (solid float32, dotted bfloat16)", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return _save(figure, path, 120)


COLUMNS = 5
"""Panels beside one another."""


def draw_speed(points: Sequence[tuple[str, str, int, float]], path: pathlib.Path) -> bool:
    """Draw speed against length, one panel per mask.

    Args:
      points: (mask, label of the line, tokens, TFLOP/s) each.
      path: PNG file to write.

    Returns:
      Whether there was anything to draw.
    """
    if not points:
        return False
    import matplotlib.figure

    masks, labels = (list(dict.fromkeys(point[i] for point in points)) for i in (0, 1))
    columns = min(COLUMNS, len(masks))
    rows = math.ceil(len(masks) / columns)
    figure = matplotlib.figure.Figure((2.8 * columns + 2.4, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    lines = {}
    for axes, mask in zip(panels, masks, strict=False):
        axes.set_title(mask, fontsize=8)
        for i, label in enumerate(labels):
            found = sorted((t, speed) for m, name, t, speed in points if (m, name) == (mask, label))
            if found:
                (lines[label],) = axes.plot(
                    *zip(*found, strict=True), marker="o", markersize=3, color=f"C{i}",
                    linestyle=("-", "--", ":")[i // 10 % 3], linewidth=1.2,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("tokens", fontsize=7)
        axes.set_ylabel("TFLOP/s of a device", fontsize=7)
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    figure.legend(
        lines.values(), lines.keys(), loc="outside right upper", fontsize=7, frameon=False
    )
    return _save(figure, path, 110)


def draw_balance(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> bool:
    """Draw a table of largest over mean area: masks and devices down, placements across.

    Args:
      rows: with "placement", "devices", "mask", "status" and "max_over_mean"; the largest of
        several draws is shown.
      path: PNG file to write.

    Returns:
      Whether there was anything to draw.
    """
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return False
    import matplotlib.figure

    names = list(dict.fromkeys(row["placement"] for row in rows))
    lines = list(dict.fromkeys((row["mask"], row["devices"]) for row in rows))
    values = [[math.nan] * len(names) for _ in lines]
    for row in rows:
        i, j = lines.index((row["mask"], row["devices"])), names.index(row["placement"])
        value = float(row["max_over_mean"])
        values[i][j] = value if math.isnan(values[i][j]) else max(values[i][j], value)
    figure = matplotlib.figure.Figure(
        (1.1 * len(names) + 3, 0.3 * len(lines) + 1.2), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(values, cmap="YlOrRd", vmin=1, vmax=2, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            text = "-" if math.isnan(value) else f"{value:.3f}"
            color = "white" if value > 1.7 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks(range(len(lines)), [f"{m}, {n} devices" for m, n in lines], fontsize=8)
    axes.set_title("largest over mean area", fontsize=9)
    return _save(figure, path, 110)


def draw_mixers(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> bool:
    """Draw time and temporary memory over length, one line per mixer, a row per direction.

    Args:
      rows: rows of the benchmark of mixers.
      path: PNG file to write.

    Returns:
      Whether there was anything to draw.
    """
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return False
    import matplotlib.figure

    directions = list(dict.fromkeys(row["direction"] for row in rows))
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    figure = matplotlib.figure.Figure((11, 3.2 * len(directions) + 0.5), layout="constrained")
    grid = figure.subplots(len(directions), 2, squeeze=False, sharex=True)
    for line, direction in zip(grid, directions, strict=True):
        for axes, (field, label) in zip(
            line, (("median_ms", "ms"), ("temporary_bytes", "temporary bytes")), strict=True
        ):
            for i, name in enumerate(names):
                points = sorted(
                    (int(r["length"]), max(1.0, float(r[field])) if field != "median_ms" else
                     float(r[field]))
                    for r in rows if r["mixer"] == name and r["direction"] == direction
                )  # fmt: skip
                if points:
                    style = ("-", "--", ":")[i // 10 % 3]
                    axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3,
                              color=f"C{i % 10}", label=name, linewidth=1.2)  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{direction}: {label}", fontsize=9)
            axes.tick_params(labelsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("tokens", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
    return _save(figure, path, 120)


def _save(figure, path, dpi):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return True
