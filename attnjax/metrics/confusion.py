# SPDX-License-Identifier: Apache-2.0
"""Confusion matrix."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionMatrix:
    """Counts of (true class, predicted class).

    Attributes:
      counts: `[v, v]` int32; the row is the true class, the column the predicted one.
    """

    counts: Array

    @classmethod
    def of(
        cls, labels: Array, predictions: Array, classes: int, *, valid: Array | None = None
    ) -> Self:
        """Count a batch.

        Args:
          labels: `[b]` true classes. Labels or predictions outside `[0, classes)` are not counted.
          predictions: `[b]` predicted classes.
          classes: number of classes v.
          valid: `[b]` booleans; all by default.

        Raises:
          ValueError: the shapes differ.
        """
        if labels.shape != predictions.shape or (valid is not None and valid.shape != labels.shape):
            shapes = labels.shape, predictions.shape, None if valid is None else valid.shape
            raise ValueError(f"labels, predictions and valid differ in shape: {shapes}")
        rows = jax.nn.one_hot(labels, classes, dtype=jnp.int32)
        if valid is not None:
            rows = rows * valid.astype(jnp.int32)[:, None]
        # A product instead of a scatter: it stays sharded over the batch until one small sum.
        return cls(rows.T @ jax.nn.one_hot(predictions, classes, dtype=jnp.int32))

    def merge(self, other: Self) -> Self:
        """Return the counts of both batches."""
        return type(self)(self.counts + other.counts)

    def compute(self) -> np.ndarray:
        """Return the counts, `[v, v]` int64."""
        return np.asarray(self.counts).astype(np.int64)
