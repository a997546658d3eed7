# SPDX-License-Identifier: Apache-2.0
"""How a row of scores becomes the weights of the values: softmax, its relatives and alternatives.

Two families, so that every one of them also has an online form that never holds a whole row:

`SoftmaxFamily`: softmax whose denominator or value has one extra term per row. An implementation
computes plain softmax attention with its log-sum-exp, and `finish` does the rest exactly:

    out' = factor * out + addition          weights' = factor * weights

`Elementwise`: with scores z of a row, its shift c and a parameter r of the row,

    out = sum_s weight(z_s, c, r) v_s / denominator(sum_s term(z_s, c, r), c, r)

where c is nothing, the row's maximum (any upper bound does: weights and terms are homogeneous in
exp(-c)), or the row's log-sum-exp (found by a first pass; weights and terms are functions of z - c
then, and z and c may both be given relative to something else, such as the maximum).

`Rowwise`: weights that need a whole row of scores at once; only `reference` serves them.

A row that may attend nothing gives zero weights. Everything is computed in float32 or wider. The
normalizers themselves, with their names and sources, are in `attnjax.ops.normalizers`.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
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

    def output(self, out: Array) -> Array:
        """Return what softmax attention `[b,t,n,hv]` becomes."""
        if self.factor is not None:
            out = out * self.factor.swapaxes(1, 2)[..., None]
        return out if self.addition is None else out + self.addition


def register(data: Sequence[str] = ()):
    """Make a class a frozen dataclass and a pytree.

    Args:
      data: fields that hold arrays and receive gradients; the others are static.
    """

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, eq=not data)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        meta = [name for name in names if name not in data]
        return jax.tree_util.register_dataclass(cls, list(data), meta)

    return register


class Normalizer:
    """Base of all; subclasses are frozen dataclasses and pytrees, what is learnt are leaves."""

    has_key: ClassVar[bool] = False
    """Whether a key of its own is scored by the queries, so that their rotation matters to it."""

    def check(self, n: int, h: int, hv: int) -> None:
        """Raise ValueError if parameters do not fit n query heads of width h and values of hv."""


@register()
class SoftmaxFamily(Normalizer):
    """Softmax, or softmax with one extra term per row; the base class is softmax itself."""

    def extra_logit(self, query: Array, scale: float, softcap: float | None) -> Array | None:
        """Return the logit `[b|1, n, t|1]` that joins every row's denominator, or None.

        Args:
          query: `[b,t,n,h]`.
          scale: factor of the raw scores.
          softcap: cap of the scaled scores, or None.
        """
        return None

    def finish(self, query: Array, lse: Array, scale: float, softcap: float | None) -> Finish:
        """Return how softmax attention with this log-sum-exp `[b,n,t]` is turned into this one."""
        return with_extra_logit(self.extra_logit(query, scale, softcap), lse)


class Elementwise(Normalizer, abc.ABC):
    """Weights that are functions of single scores, see the module's equation.

    Scores arrive as -inf where a query may not attend and must give exactly zero weight and term
    there. `weight` and `term` are differentiated by JAX; they must have finite derivatives
    everywhere, also at -inf and for large scores.
    """

    shift: ClassVar[str] = "none"
    """"none", "max" or "lse"."""

    floor: ClassVar[float] = EMPTY_LSE
    """The shift "max" is the maximum of the row and this."""

    is_signed: ClassVar[bool] = False
    """Whether weights may be negative."""

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


class Rowwise(Normalizer, abc.ABC):
    """Weights that are functions of whole rows of scores."""

    @abc.abstractmethod
    def weights(self, scores: Array) -> Array:
        """Return the weights `[b,n,t,s]` of scores `[b,n,t,s]`, which are -inf where masked."""


def softmax(scores: Array, where: Array | None = None) -> tuple[Array, Array]:
    """Normalise rows of scores so that rows of nothing but -inf become zero.

    Args:
      scores: `[..., s]`, -inf where a query may not attend.
      where: bool `[..., s]`, keys to leave out besides; None for none.

    Returns:
      Weights `[..., s]` and log-sum-exp `[...]`, `EMPTY_LSE` for empty rows.
    """
    if where is not None:
        scores = jnp.where(where, scores, -jnp.inf)
    # The maximum cancels in the result, so it needs no gradient; it is kept finite because
    # (-inf) - (-inf) would poison rows that may attend nothing.
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), EMPTY_LSE))
    exponential = jnp.exp(scores - top)
    total = exponential.sum(axis=-1, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    lse = jnp.where(is_empty, EMPTY_LSE, top + jnp.log(total))
    return exponential / total, lse[..., 0]


def with_extra_logit(extra: Array | None, lse: Array, value: Array | None = None) -> Finish:
    """Softmax with one more logit in the denominator.

    Args:
      extra: `[b|1, n, t|1]`, or None for none.
      lse: `[b,n,t]` log-sum-exp of the other logits.
      value: `[n, hv]` that the logit carries, or None for zero.
    """
    if extra is None:
        return Finish(lse)
    extra = extra.astype(lse.dtype)
    # Of the difference, not of two rounded log-sum-exps: exact for logits of any size.
    factor = jax.nn.sigmoid(lse - extra)
    addition = None
    if value is not None:
        share_btn = jax.nn.sigmoid(extra - lse).swapaxes(1, 2)
        addition = share_btn[..., None] * value.astype(lse.dtype)
    return Finish(jnp.logaddexp(lse, extra), factor, addition)
