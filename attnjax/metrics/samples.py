# SPDX-License-Identifier: Apache-2.0
"""How good sampled pictures are, judged by a classifier and by moments of the real ones.

Stands in for the FID (arXiv 1706.08500), whose network of photographs says nothing of small
pictures. Features are pixels, averaged to at most 8 x 8 places. Half of the real rows, every other
one of each class, are the reference; the other half shows what real pictures reach.

- recognised: share of samples that regularised Gaussian classes (Friedman, "Regularized
  Discriminant Analysis", 1989), fitted to the reference in closed form, take for their class.
- frechet: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), distance of two normal distributions. It
  shrinks with more rows: compare it at equal numbers.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array

SIDE = 8
"""Places along a side of a picture that features keep apart."""

SHRINK = 0.5
"""Share of the covariance of all classes in that of one."""

RIDGE = 0.1
"""Part of the mean variance that is added to every variance."""


def pooled_pixels(picture: Array) -> Array:
    """Return features float32 `[b, f]` of pictures `[b, y, x, c]`: means over squares.

    Raises:
      ValueError: the shape is no such one.
    """
    if picture.ndim != 4:
        raise ValueError(f"picture {picture.shape}: must be [b, y, x, c]")
    b, rows, columns, c = picture.shape
    down, across = (size // SIDE if size % SIDE == 0 else 1 for size in (rows, columns))
    squares = picture.astype(jnp.float32).reshape(
        b, rows // down, down, columns // across, across, c
    )
    return squares.mean(axis=(2, 4)).reshape(b, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleQuality:
    """A measure of samples; keeps the features of all rows.

    Attributes:
      real: float32 `[m, f]`, of real pictures.
      made: the same of samples, row by row of the same class.
      label: int32 `[m]`.
      valid: bool `[m]`.
      measure: a key of `MEASURES`.
    """

    real: Array
    made: Array
    label: Array
    valid: Array
    measure: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, measure: str, real: Array, made: Array, label: Array, *, valid: Array | None = None
    ) -> Self:
        """Keep a batch.

        Args:
          measure: a key of `MEASURES`.
          real: pictures `[b, y, x, c]`.
          made: samples, the same shape.
          label: integers `[b]`, the class of both.
          valid: bool `[b]`, rows that count; all by default.

        Raises:
          ValueError: the measure is unknown or the shapes do not fit.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure {measure!r}: choose from {', '.join(MEASURES)}")
        if real.shape != made.shape or label.shape != real.shape[:1]:
            raise ValueError(
                f"real {real.shape}, made {made.shape} and label {label.shape} do not fit"
            )
        valid = jnp.ones(label.shape, bool) if valid is None else valid
        return cls(pooled_pixels(real), pooled_pixels(made), label, valid, measure)

    def merge(self, other: Self) -> Self:
        """Return the rows of both batches."""
        pairs = ((getattr(x, n) for x in (self, other)) for n in ("real", "made", "label", "valid"))
        return type(self)(*(jnp.concatenate(list(pair)) for pair in pairs), self.measure)

    def compute(self) -> float:
        """Return the measure; NaN with fewer than four valid rows of a class."""
        keep = np.asarray(self.valid)
        real, made = (np.asarray(x, np.float64)[keep] for x in (self.real, self.made))
        label = np.asarray(self.label)[keep]
        counts = np.unique(label, return_counts=True)[1]
        if not len(counts) or counts.min() < 4 or not np.isfinite(made).all():
            return float("nan")
        return float(MEASURES[self.measure](real, made, label, every_other(label)))


def every_other(label: np.ndarray) -> np.ndarray:
    """Return bool `[m]`: the first, third, .. row of every class of labels `[m]`."""
    chosen = np.zeros(len(label), bool)
    for c in np.unique(label):
        chosen[np.flatnonzero(label == c)[::2]] = True
    return chosen


def classify(reference: np.ndarray, label: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Give every row the class under whose normal distribution it is likeliest.

    Covariances are `SHRINK` that of all classes and the rest their own, with a `RIDGE`.

    Args:
      reference: float64 `[m, f]`.
      label: integers `[m]`, at least two rows of each.
      rows: float64 `[k, f]`.

    Returns:
      Labels `[k]`.
    """
    classes = np.unique(label)
    means = np.stack([reference[label == c].mean(axis=0) for c in classes])
    centred = reference - means[np.searchsorted(classes, label)]
    pooled = centred.T @ centred / len(centred)
    ridge = RIDGE * np.trace(pooled) / len(pooled) * np.eye(len(pooled))
    scores = []
    for c, mean in zip(classes, means, strict=True):
        own = centred[label == c]
        own = own.T @ own / len(own)
        factor = np.linalg.cholesky(SHRINK * pooled + (1 - SHRINK) * own + ridge)
        away = np.linalg.solve(factor, (rows - mean).T)
        scores.append(-0.5 * np.square(away).sum(axis=0) - np.log(np.diag(factor)).sum())
    return classes[np.argmax(scores, axis=0)]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared distance of normal distributions with the moments of two sets of rows.

    Args:
      a: float64 `[m, f]`.
      b: float64 `[k, f]`.
    """
    first, second = (np.atleast_2d(np.cov(x, rowvar=False, bias=True)) for x in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # C C' has the eigenvalues of the symmetric R C' R with R R = C.
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    apart = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(max(apart + np.trace(first) + np.trace(second) - 2 * cross, 0.0))


def _recognised(rows, of_rows, real, label, half):
    return np.mean(classify(real[half], label[half], rows) == of_rows)


MEASURES = {
    "frechet": lambda real, made, label, half: frechet_distance(made, real[half]),
    "frechet_real": lambda real, made, label, half: frechet_distance(real[~half], real[half]),
    "recognised": lambda real, made, label, half: _recognised(made, label, real, label, half),
    "recognised_real": lambda real, made, label, half: _recognised(
        real[~half], label[~half], real, label, half
    ),
}
"""Name -> function of features, labels and which rows are the reference."""
