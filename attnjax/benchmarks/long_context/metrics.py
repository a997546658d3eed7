# SPDX-License-Identifier: Apache-2.0
"""What a cell's time and bytes mean: operations, speed, and the values of cells without a time."""

from collections.abc import Sequence

from attnjax.benchmarks.contestants import PASSES, attention_flops
from attnjax.benchmarks.turns import OK, OUT_OF_MEMORY

MEMORY_VALUE = -1000.0
"""Speed and memory of a cell that ran out of memory."""
REFUSED_VALUE = -1.0
"""Speed and memory of a cell that its contestant does not support."""

WORKLOADS = {"forward": "fwd", "backward": "bwd", "both": "1f1b"}
"""Directions in the words of the paper's tables."""


def block_sparse_flops(
    queries: int, keys: int, heads: int, width: int, ratio: float, direction: str = "forward"
) -> float:
    """Return 4 queries keys heads width ratio, times 2.5 backward: the nominal operations.

    The number of kept blocks is rounded down, so that `attention_flops` of the area is a little
    less.
    """
    return attention_flops(queries * keys * ratio, heads, width, direction)


def per_device_tflops(flops: float, milliseconds: Sequence[float]) -> float:
    """Return operations over the summed time of all ranks, 10^12 per second (LongCA-bench).

    Args:
      flops: operations of all ranks together.
      milliseconds: time of each rank.
    """
    return flops / sum(milliseconds) * 1e-9


def slowest_tflops(flops: float, milliseconds: Sequence[float]) -> float:
    """Return operations over the slowest rank's time, for each of the ranks, 10^12 per second.

    This is MagiAttention's figure; see `per_device_tflops`, which it never exceeds.
    """
    return flops / (max(milliseconds) * len(milliseconds)) * 1e-9


def value_of(status: str, measured: float | str) -> float:
    """Return a measured number, or the value that stands for why there is none.

    Args:
      status: of the cell.
      measured: the number, or its text in a file; read only when the status is ok.
    """
    if status == OK:
        return float(measured)
    return MEMORY_VALUE if status == OUT_OF_MEMORY else REFUSED_VALUE


def mean_of(statuses: Sequence[str], measured: Sequence[float | str]) -> float:
    """Return the mean over drawn masks of what was measured.

    Args:
      statuses: of the cells.
      measured: their numbers.

    Returns:
      The mean of those that are ok; `MEMORY_VALUE` or `REFUSED_VALUE` when none is, whichever the
      first one has.
    """
    pairs = list(zip(statuses, measured, strict=True))
    good = [float(value) for status, value in pairs if status == OK]
    return sum(good) / len(good) if good else value_of(*pairs[0])


__all__ = [
    "MEMORY_VALUE",
    "PASSES",
    "REFUSED_VALUE",
    "WORKLOADS",
    "attention_flops",
    "block_sparse_flops",
    "mean_of",
    "per_device_tflops",
    "slowest_tflops",
    "value_of",
]
