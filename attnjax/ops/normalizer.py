# SPDX-License-Identifier: Apache-2.0
"""How a row of scores becomes the weights of the values: softmax, its relatives and alternatives.

Two families, so that every one of them also has an online form that never holds a whole row:

`SoftmaxFamily`: softmax whose denominator or value has one extra term per row. An implementation
computes plain softmax attention with its log-sum-exp, and `finish` does the rest exactly:

    out' = factor * out + addition          weights' = factor * weights

`Elementwise`: with scores z of a row, its shift c and a parameter r of the row,

    out = sum_s weight(z_s, c, r) v_s / denominator(sum_s term(z_s, c, r), c, r)

where c is nothing, the row's maximum (any upper bound does: weights and terms are homogeneous in
exp(-c)), or the row's log-sum-exp (found by a first pass).

A row that may attend nothing gives zero weights. Everything is computed in float32 or wider.
"""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from attnjax.typing import Array

EMPTY_LSE = -1e30
"""Log-sum-exp of a row that may attend nothing: finite, so that differences of two stay finite."""


@dataclasses.dataclass(frozen=True)
class Finish:
    """What a softmax relative does to softmax attention.

    Attributes:
      lse: `[b,n,t]` log-sum-exp including the extra term.
      factor: `[b,n,t]` factor of output and weights, or None for 1.
      addition: broadcastable to `[b,t,n,hv]`, added to the output, or None.
    """

    lse: Array
    factor: Array | None = None
    addition: Array | None = None


class SoftmaxFamily:
    """Softmax, or softmax with one extra term per row; the base class is softmax itself."""

    def extra_logit(self, query: Array, scale: float) -> Array | None:
        """Return the logit `[b|1, n, t|1]` that joins every row's denominator, or None.

        Args:
          query: `[b,t,n,h]`.
          scale: factor of the raw scores.
        """
        return None

    def finish(self, query: Array, lse: Array, scale: float) -> Finish:
        """Return how softmax attention with this log-sum-exp `[b,n,t]` is turned into this one."""
        return _with_extra_logit(self.extra_logit(query, scale), lse, None)


class Elementwise(abc.ABC):
    """Weights that are functions of single scores, see the module's equation.

    Scores arrive as -inf where a query may not attend and must give exactly zero weight and term
    there. `weight` and `term` are differentiated by JAX; they must have finite derivatives
    everywhere, also at -inf and for large scores.
    """

    shift: ClassVar[str] = "none"
    """"none", "max" or "lse"."""

    @abc.abstractmethod
    def weight(self, scores: Array, shift: Array | None, row: Array | None) -> Array:
        """Return the factor of each value, in the shape of the scores `[..., t, s]`.

        Args:
          scores: `[..., t, s]`, -inf where masked.
          shift: `[..., t, 1]` maximum or log-sum-exp, or None.
          row: `[..., t, 1]` from `row_parameter`, or None.
        """

    def term(self, scores: Array, shift: Array | None, row: Array | None) -> Array | None:
        """Return what the denominator sums, or None when there is no denominator."""
        return None

    def denominator(self, total: Array, shift: Array | None) -> Array:
        """Return what the weighted sum of values is divided by, never zero."""
        raise NotImplementedError

    def row_parameter(self, visible: Array) -> Array | None:
        """Return a differentiable parameter `[b|1, n|1, t]` of every row, or None.

        Args:
          visible: number of keys that each query may attend, int32 `[b|1, n|1, t]`.
        """
        return None


def _with_extra_logit(extra, lse, value) -> Finish:
    """Softmax with one more logit in the denominator that carries `value [..., n, hv]`."""
    if extra is None:
        return Finish(lse)
    extra = extra.astype(lse.dtype)
    total = jnp.logaddexp(lse, extra)
    factor = jnp.exp(lse - total)
    if value is None:
        return Finish(total, factor)
    share_btn = jnp.broadcast_to(jnp.exp(extra - total), lse.shape).swapaxes(1, 2)
    return Finish(total, factor, share_btn[..., None] * value.astype(lse.dtype))


NORMALIZERS = {
    "softmax": SoftmaxFamily,
}
"""Name -> class; those without parameters can be given to `attention` by name."""
