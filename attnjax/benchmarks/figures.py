# SPDX-License-Identifier: Apache-2.0
"""Pictures of benchmark results."""

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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
