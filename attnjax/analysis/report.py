# SPDX-License-Identifier: Apache-2.0
"""What an analysis returns: numbers with their definitions, tables, arrays and pictures of them.

The same inputs give the same bytes; nothing here has a clock.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from attnjax.typing import Array

LEGEND = 10
"""Most names that a picture explains."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A measured number.

    Attributes:
      value: the number.
      definition: what it is, in one sentence.
      error: its standard error, where it has one.
    """

    value: float
    definition: str
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Lines:
    """A picture of lines over a common axis.

    Attributes:
      x: `[k]`.
      y: name of a line -> `[k]`.
      labels: of both axes.
      log_x: logarithmic; x is above 0.
    """

    x: Array
    y: Mapping[str, Array]
    labels: tuple[str, str]
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """A picture of matrices on one scale of colours around 0.

    Attributes:
      matrices: title -> `[rows, columns]`.
    """

    matrices: Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Scatter:
    """A picture of points.

    Attributes:
      points: name of a group -> `[k, 2]`.
      labels: of both axes.
    """

    points: Mapping[str, Array]
    labels: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that one measure found.

    Attributes:
      title: what was measured.
      numbers: by name.
      tables: name -> column -> values, columns of one length.
      arrays: name -> array.
      pictures: name -> what to draw.
    """

    title: str
    numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Sequence]] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Lines | HeatMaps | Scatter] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Return title, numbers and tables as JSON; what is not finite becomes null."""
        numbers = {name: dataclasses.asdict(number) for name, number in self.numbers.items()}
        tables = {
            name: {column: list(map(_plain, values)) for column, values in table.items()}
            for name, table in self.tables.items()
        }
        for number in numbers.values():
            number["value"] = _plain(number["value"])
        return json.dumps({"title": self.title, "numbers": numbers, "tables": tables}, indent=2)

    def to_markdown(self) -> str:
        """Return numbers and tables to read."""
        lines = [f"# {self.title}", ""]
        if self.numbers:
            lines += ["| number | value | what it is |", "|---|---|---|"]
            for name, number in self.numbers.items():
                error = "" if number.error is None else f" +- {number.error:.2g}"
                lines.append(f"| {name} | {number.value:.5g}{error} | {number.definition} |")
            lines.append("")
        for name, table in self.tables.items():
            lines += [f"## {name}", "", f"| {' | '.join(table)} |", "|" + "---|" * len(table)]
            for row in zip(*table.values(), strict=True):
                lines.append(f"| {' | '.join(map(_shown, row))} |")
            lines.append("")
        return "\n".join(lines)

    def write(self, folder: str | pathlib.Path, name: str) -> list[pathlib.Path]:
        """Write `NAME.json`, `NAME.md`, `NAME-TABLE.csv`, `NAME.npz` and `NAME-PICTURE.png`.

        Args:
          folder: is made if missing.
          name: of this report.

        Returns:
          The files.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {f"{name}.json": self.to_json() + "\n", f"{name}.md": self.to_markdown()}
        for title, table in self.tables.items():
            buffer = io.StringIO()
            writer = csv.writer(buffer, lineterminator="\n")
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
            texts[f"{name}-{title}.csv"] = buffer.getvalue()
        for file, text in texts.items():
            (folder / file).write_text(text)
        written = [folder / file for file in texts]
        if self.arrays:
            path = folder / f"{name}.npz"
            np.savez(path, **{key: np.asarray(value) for key, value in self.arrays.items()})
            written.append(path)
        for title, picture in self.pictures.items():
            path = folder / f"{name}-{title}.png"
            draw(picture, title.replace("_", " "), path)
            written.append(path)
        return written


def draw(picture: Lines | HeatMaps | Scatter, title: str, path: pathlib.Path) -> None:
    """Draw a picture to a PNG file. Matplotlib is imported here and never opens a window."""
    import matplotlib.figure

    count = len(picture.matrices) if isinstance(picture, HeatMaps) else 1
    figure = matplotlib.figure.Figure((max(5.0, 2.4 * count), 3.4), layout="constrained")
    grid = figure.subplots(1, count, squeeze=False)[0]
    if isinstance(picture, HeatMaps):
        top = max(float(np.abs(matrix).max()) for matrix in picture.matrices.values()) or 1.0
        for axes, (name, matrix) in zip(grid, picture.matrices.items(), strict=True):
            image = axes.imshow(np.asarray(matrix), cmap="RdBu", vmin=-top, vmax=top)
            axes.set_title(name, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
        figure.colorbar(image, ax=list(grid), shrink=0.8)
    elif isinstance(picture, Lines):
        for name, values in picture.y.items():
            grid[0].plot(picture.x, values, label=name, linewidth=1.4)
        if picture.log_x:
            grid[0].set_xscale("log")
    else:
        for name, points in picture.points.items():
            grid[0].scatter(*np.asarray(points).T, label=name, s=14)
    if not isinstance(picture, HeatMaps):
        grid[0].set_xlabel(picture.labels[0], fontsize=9)
        grid[0].set_ylabel(picture.labels[1], fontsize=9)
        if len(grid[0].get_legend_handles_labels()[1]) <= LEGEND:
            grid[0].legend(frameon=False, fontsize=8)
        grid[0].grid(linewidth=0.4)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _plain(value):
    if isinstance(value, str | bool | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _shown(value):
    return value if isinstance(value, str) else f"{value:.5g}"
