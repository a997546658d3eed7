# SPDX-License-Identifier: Apache-2.0
"""Weighted mean, and the two accuracies built on it."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from attnjax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """Mean of values: `sum(weight * value) / sum(weight)`.

    Attributes:
      total: scalar sum of weighted values; int32 if values are boolean and weights a mask.
      weight: scalar sum of weights; int32 if weights are a mask.
    """

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, *, valid: Array | None = None) -> Self:
        """Sum the values of a batch.

        Args:
          values: `[b]` (or any shape) booleans or numbers.
          valid: the same shape: a boolean mask, or non-negative float weights; all by default.
            Where it is zero the value does not matter, not even when it is NaN.

        Raises:
          ValueError: the shapes differ.
        """
        values = jnp.asarray(values)
        weights = jnp.ones(values.shape, bool) if valid is None else jnp.asarray(valid)
        if values.shape != weights.shape:
            raise ValueError(f"values {values.shape} and valid {weights.shape} differ in shape")
        is_mask = weights.dtype == bool
        # Counting in integers stays exact beyond 2**24 examples, where float32 stops counting.
        weights = weights.astype(jnp.int32 if is_mask else jnp.float32)
        is_count = is_mask and values.dtype == bool
        terms = values.astype(jnp.int32 if is_count else jnp.float32) * weights
        terms = jnp.where(weights > 0, terms, jnp.zeros_like(terms))
        return cls(total=jnp.sum(terms), weight=jnp.sum(weights))

    def merge(self, other: Self) -> Self:
        """Return the mean over both batches."""
        return type(self)(self.total + other.total, self.weight + other.weight)

    def compute(self) -> float:
        """Return the mean; NaN if nothing was valid."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


def is_among_top(logits: Array, labels: Array, k: int) -> Array:
    """Say whether the label is one of the k highest logits.

    Equal logits rank in the order of classes, as `argmax` has it. A NaN logit ranks above all
    others, and an example whose label has a NaN logit, or no logit at all, is wrong.

    Args:
      logits: `[b, v]` floats.
      labels: `[b]` integers.
      k: how many guesses are allowed, at least 1.

    Returns:
      `[b]` booleans.

    Raises:
      ValueError: shapes do not fit or k is below 1.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} are not [b, v] and [b]")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    classes = logits.shape[-1]
    known = (labels >= 0) & (labels < classes)
    own = jnp.take_along_axis(logits, jnp.clip(labels, 0, classes - 1)[:, None], axis=-1)
    earlier = jnp.arange(classes)[None, :] < labels[:, None]
    # Negated, so that comparisons with NaN count against the label.
    ahead = ~(logits <= own) | ((logits == own) & earlier)
    return known & (jnp.sum(ahead, axis=-1) < k)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accuracy(Mean):
    """Share of examples whose highest logit is the label's."""

    @classmethod
    def from_logits(cls, logits: Array, labels: Array, *, valid: Array | None = None) -> Self:
        """Count hits; see `is_among_top` for shapes, ties and NaN."""
        return cls.of(is_among_top(logits, labels, 1), valid=valid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK(Mean):
    """Share of examples whose label is among the k highest logits."""

    @classmethod
    def from_logits(
        cls, logits: Array, labels: Array, k: int, *, valid: Array | None = None
    ) -> Self:
        """Count hits; see `is_among_top` for shapes, ties and NaN."""
        return cls.of(is_among_top(logits, labels, k), valid=valid)
