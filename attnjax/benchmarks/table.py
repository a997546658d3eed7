# SPDX-License-Identifier: Apache-2.0
"""Results of a benchmark in a CSV file that grows cell by cell, so that a run can be resumed."""

import csv
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any


def read(path: pathlib.Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of a CSV file; none when it does not exist or is empty.

    Args:
      path: the file.
      fields: the columns it must have.

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


def append(path: pathlib.Path, fields: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a CSV file, which is made with its header when there is none."""
    is_new = not path.exists() or not path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
