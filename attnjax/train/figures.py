# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run. Matplotlib is imported on first use and never opens a window."""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INK, _QUIET, _GRID = "#22262b", "#6b7480", "#e3e6ea"
_TRAIN = "#9aa7b5"
_SERIES = ("#2166ac", "#d6604d", "#1b9e77", "#7b3294", "#e69f00")
_RIGHT, _WRONG = "#1a7f4b", "#c0392b"
_DPI = 140
_ANNOTATED_CLASSES = 20
_SMOOTHED_POINTS = 60


def _figure(width: float, height: float):
    """Make a figure without pyplot: no global state, no display, safe in threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)


def draw_curves(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> bool:
    """Draw loss, accuracy and learning rate over steps.

    Args:
      records: records of metrics.jsonl; names are `train/<metric>` and `<evaluation>/<metric>`.
      path: PNG to write.

    Returns:
      Whether there was anything to draw.
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and value is not None:
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    panels = [
        (title, [n for n in series if n.rpartition("/")[2] == metric])
        for title, metric in (("loss", "loss"), ("accuracy", "accuracy"), ("learning rate", "lr"))
    ]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return False
    evaluations = list(dict.fromkeys(n.partition("/")[0] for n in series if "/" in n))
    evaluations = [name for name in evaluations if name not in ("train", "speed")]
    figure = _figure(4.2 * len(panels), 3.2)
    for axes, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _tidy(axes, title)
        for name in names:
            _draw_series(axes, name, *series[name], evaluations)
        axes.set_xlabel("step", fontsize=8, color=_QUIET)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _limit(axes, title, [v for n in names for v in series[n][1]])
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)
    return True


def _draw_series(axes, name, steps, values, evaluations) -> None:
    label = name.partition("/")[0] if "/" in name else "train"
    if label in evaluations:
        color = _SERIES[evaluations.index(label) % len(_SERIES)]
        axes.plot(steps, values, color=color, marker="o", markersize=3.5, label=label, zorder=3)
        return
    if name.rpartition("/")[2] == "lr":
        axes.plot(steps, values, color=_SERIES[0], linewidth=1.6, label=label)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        return
    if len(values) < _SMOOTHED_POINTS:
        axes.plot(steps, values, color=_TRAIN, linewidth=1.6, label=label)
        return
    # Many noisy points: show them faintly, and on top their running median, which ignores spikes.
    axes.plot(steps, values, color=_TRAIN, linewidth=0.7, alpha=0.45)
    half = max(len(values) // 60, 1)
    padded = np.pad(np.asarray(values, float), half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    label = f"{label} (running median)"
    axes.plot(steps, np.median(windows, axis=1), color="#5b6b7c", linewidth=1.6, label=label)


def _limit(axes, title: str, values: Sequence[float]) -> None:
    if title == "accuracy":
        axes.set_ylim(min(0.0, *values), 1.02)
    elif title == "loss" and len(values) > 10:
        # One diverging step must not flatten the rest of the curve.
        top = float(np.percentile(values, 99)) * 1.15
        if 0 < top < max(values):
            axes.set_ylim(top=top, bottom=min(0.0, *values))
    if title == "learning rate":
        axes.set_ylim(bottom=0)


def draw_confusion(counts: np.ndarray, path: pathlib.Path, class_names: Sequence[str] = ()) -> None:
    """Draw a confusion matrix; colour is the share of the true class, numbers are examples.

    Args:
      counts: `[v, v]` integers, rows the true classes.
      path: PNG to write.
      class_names: names of the classes; numbers by default.
    """
    from matplotlib.colors import PowerNorm

    classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [str(class_names[i]) if i < len(class_names) else str(i) for i in range(classes)]
    size = min(max(4.4, 0.42 * classes + 1.4), 9.0)
    figure = _figure(size + 0.8, size)
    axes = figure.subplots()
    # Square-root colours: a few per cent of mistakes stay visible beside a full diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    title = f"{100 * accuracy:.1f} % of {counts.sum():,} examples correct"
    axes.set_title(title, loc="left", fontsize=10, color=_INK, fontweight="bold")
    every = math.ceil(classes / 25)
    ticks = range(0, classes, every)
    are_long = any(len(name) > 3 for name in names)
    axes.set_xticks(ticks, [_short(names[i]) for i in ticks], rotation=60 if are_long else 0)
    if are_long:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, [_short(names[i]) for i in ticks])
    axes.set_xlabel("predicted class", fontsize=9, color=_QUIET)
    axes.set_ylabel("true class", fontsize=9, color=_QUIET)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    if classes <= _ANNOTATED_CLASSES:
        axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        for i, j in np.argwhere(counts > 0):
            color = "white" if shares[i, j] > 0.4 else _INK
            text = f"{counts[i, j]}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "5 %", "25 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_QUIET, labelsize=8, length=0)
    bar.set_label("share of the true class", fontsize=8, color=_QUIET)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)


def draw_attention(
    explanation: Mapping[str, Any], path: pathlib.Path, class_names: Sequence[str] = ()
) -> None:
    """Draw every example in a row: the image, then each attention map laid over it.

    Args:
      explanation: `image [b, y, x, c]`, `prediction [b]`, `maps` (title -> `[b, y, x]`), and
        `label [b]` if known.
      path: PNG to write.
      class_names: names of the classes; numbers by default.
    """
    images = np.asarray(explanation["image"], np.float32)
    maps = {title: np.asarray(m, np.float32) for title, m in explanation["maps"].items()}
    labels = explanation.get("label")
    rows, columns = len(images), 1 + len(maps)
    figure = _figure(1.75 * columns, 1.75 * rows + 0.55)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        picture = _displayable(images[row])
        for axes in grid[row]:
            axes.set_axis_off()
        grid[row, 0].imshow(picture, interpolation="nearest")
        prediction = int(explanation["prediction"][row])
        caption, color = [f"predicted {_name(prediction, class_names)}"], _INK
        if labels is not None:
            label = int(labels[row])
            caption = [f"true {_name(label, class_names)}", *caption]
            color = _RIGHT if label == prediction else _WRONG
        text = ", ".join(caption)
        text = text if len(text) <= 24 else "\n".join(caption)
        grid[row, 0].set_title(text, fontsize=7.5, color=color, fontweight="bold", pad=3)
        for axes, (title, heat) in zip(grid[row, 1:], maps.items(), strict=True):
            _overlay(axes, picture, heat[row])
            if row == 0:
                axes.set_title(textwrap.fill(title, 20), fontsize=8, color=_INK, pad=3)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)


def _overlay(axes, picture: np.ndarray, heat: np.ndarray) -> None:
    """Lay a map over a grey, dimmed picture."""
    height, width = picture.shape[:2]
    grey = picture.mean(axis=-1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(grey, cmap="gray", vmin=-0.1, vmax=1.2, extent=extent)
    span = float(heat.max() - heat.min())
    scaled = (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)
    # The less attention, the more of the picture shines through.
    layer = {"cmap": "inferno", "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    axes.imshow(scaled, alpha=0.3 + 0.45 * scaled, extent=extent, **layer)
    axes.set(xlim=extent[:2], ylim=extent[2:])


def _displayable(image: np.ndarray) -> np.ndarray:
    """Stretch a normalised `[y, x, c]` image to `[y, x, 3]` in 0 to 1."""
    image = np.nan_to_num(image)
    low, high = np.percentile(image, (0.5, 99.5))
    if high <= low:
        low, high = float(image.min()), float(image.max())
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    if scaled.shape[-1] == 3:
        return scaled
    return np.repeat(scaled.mean(axis=-1, keepdims=True), 3, axis=-1)


def _name(index: int, class_names: Sequence[str]) -> str:
    return _short(str(class_names[index])) if index < len(class_names) else str(index)


def _short(name: str) -> str:
    # A dollar sign would start mathematical typesetting.
    name = name.replace("$", r"\$")
    return name if len(name) <= 18 else name[:17] + "…"


def draw_board(
    names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], path
) -> None:
    """Draw a table of scores as a heat map, and as a radar beside it.

    Args:
      names: rows.
      columns: at least one.
      values: a number for each row and column, NaN where there is none; 0 is average.
      path: PNG to write.
    """
    table = np.asarray(values, float)
    rows, count = table.shape
    figure = _figure(0.75 * count + 7.2, max(3.6, 0.34 * rows + 1.6))
    grid = figure.add_gridspec(1, 2, width_ratios=(0.75 * count + 1.6, 5.0))
    heat = figure.add_subplot(grid[0])
    heat.imshow(table, cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    heat.set_xticks(range(count), columns, rotation=40, ha="right", fontsize=7, color=_INK)
    heat.set_yticks(range(rows), names, fontsize=8, color=_INK)
    for row, column in zip(*np.nonzero(np.isfinite(table)), strict=True):
        value = table[row, column]
        color = "white" if abs(value) > 1.3 else _INK
        heat.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    heat.set_title("index by task", loc="left", fontsize=10, color=_INK, fontweight="bold")

    radar = figure.add_subplot(grid[1], projection="polar")
    angles = 2 * np.pi * np.arange(count) / count
    closed = np.append(angles, angles[0])
    for number, name in enumerate(names):
        # Outliers would leave the others in a point at the rim.
        line = np.clip(table[number], -2.5, 2.5)
        radar.plot(
            closed, np.append(line, line[0]), marker="o", markersize=2.5, linewidth=1.1,
            color=f"C{number % 10}", linestyle="-" if number < 10 else ":", label=name,
        )  # fmt: skip
    radar.set_xticks(angles, columns, fontsize=6, color=_QUIET)
    radar.set_ylim(-2.5, 2.5)
    radar.tick_params(axis="y", labelsize=6, colors=_QUIET)
    radar.legend(loc="upper left", bbox_to_anchor=(1.1, 1.05), fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
