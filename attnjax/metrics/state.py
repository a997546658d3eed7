# SPDX-License-Identifier: Apache-2.0
"""The contract of a metric state, and operations on a dict of them."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np


@runtime_checkable
class Metric(Protocol):
    """A pytree of sums: made from a batch inside `jit`, merged, and computed once at the end."""

    def merge(self, other: Self) -> Self:
        """Return the state of both batches together."""
        ...

    def compute(self) -> float | np.ndarray:
        """Return the value on the host."""
        ...


def merge(a: Mapping[str, Any] | None, b: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two dicts of states name by name; `None` is the empty start.

    Raises:
      ValueError: the names differ.
    """
    if a is None:
        return dict(b)
    if a.keys() != b.keys():
        raise ValueError(f"metric names differ: {sorted(a)} and {sorted(b)}")
    return {name: state.merge(b[name]) for name, state in a.items()}


def compute(states: Mapping[str, Any]) -> dict[str, float | np.ndarray]:
    """Return the value of every state by name."""
    return {name: state.compute() for name, state in states.items()}
