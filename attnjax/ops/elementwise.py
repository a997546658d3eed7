# SPDX-License-Identifier: Apache-2.0
"""Alternatives to softmax whose weights are functions of single scores.

Numbers in brackets are those of "Attention Sink in Transformers: A Survey", arXiv 2604.10098,
section A; "survey" and "code" say whether the form is the survey's or the original authors'. Where
the two differ, the survey's has a class of its own, `...Survey`.

Every branch that is not taken is computed at a harmless score, so that its derivative is finite.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops.normalizer import Elementwise, register
from attnjax.typing import Array

EPSILON = 1e-8
"""Added to sums of weights that are normalised, in the original authors' codes."""


@register()
class Clipped(Elementwise):
    """clip((zeta - gamma) softmax(z) + gamma, 0, 1); no gradient where it clips. [8, code]

    Attributes:
      gamma: at most 0; negative values give exact zeros.
      zeta: at least 1; larger values give exact ones.
    """

    gamma: float
    zeta: float = 1.0
    shift: ClassVar[str] = "lse"

    @classmethod
    def from_alpha(cls, alpha: float, max_length: int, zeta: float = 1.0) -> "Clipped":
        """Return the form whose threshold is relative to uniform weights: gamma = -alpha / T_max.

        Args:
          alpha: at least 0; the authors' example is 12.
          max_length: longest sequence of the model.
          zeta: see the class.
        """
        return cls(-alpha / max_length, zeta)

    def check(self, n, h, hv):
        if not (self.gamma <= 0 and self.zeta >= 1):
            raise ValueError(f"need gamma <= 0 and zeta >= 1, got {self.gamma} and {self.zeta}")

    def weight(self, scores, shift, row):
        stretched = (self.zeta - self.gamma) * jnp.exp(scores - shift) + self.gamma
        # Not jnp.clip: on the limits it has half a gradient.
        return jnp.where(stretched <= 0, 0, jnp.where(stretched >= 1, 1, stretched))


@register()
class Softpick(Elementwise):
    """relu(e^z - 1) / (sum |e^z - 1| + epsilon): scores up to 0 get nothing. [9, code]

    Computed with both exponentials times e^-m, m = max(0, max z): the authors' m = max z overflows
    where all scores are far below 0. Epsilon is multiplied alike, so that m cancels and needs no
    derivative; the authors' stable form adds it as it is, which weights see by less than 1e-8.
    """

    shift: ClassVar[str] = "max"
    floor: ClassVar[float] = 0.0

    def weight(self, scores, shift, row):
        is_above = scores > 0
        above = jnp.where(is_above, scores, 0)
        return jnp.where(is_above, -jnp.exp(above - shift) * jnp.expm1(-above), 0)

    def term(self, scores, shift, row):
        is_below = (scores <= 0) & (scores > -jnp.inf)
        below = -jnp.exp(-shift) * jnp.expm1(jnp.where(is_below, scores, 0))
        return jnp.where(is_below, below, self.weight(scores, shift, row))

    def denominator(self, total, shift):
        return total + EPSILON * jnp.exp(-shift)


@register(("threshold",))
class SoftpickSurvey(Elementwise):
    """relu(softmax(z) - threshold). [9, survey, Eq. 53]

    Attributes:
      threshold: scalar, `[n]` or `[1]`; may be learnt.
    """

    threshold: Array
    shift: ClassVar[str] = "lse"

    def check(self, n, h, hv):
        _check_heads("threshold", self.threshold, n)

    def row_parameter(self, visible):
        return -_as_rows(self.threshold)

    def weight(self, scores, shift, row):
        return _visible_relu(scores, jnp.exp(scores - shift) + row)


@register(("tau",))
class Elastic(Elementwise):
    """relu(softmax(z) + tau / i), i keys being visible to the query. [10, code, Lazy Attention]

    Attributes:
      tau: `[n]` or `[1]`, learnt from -1.
    """

    tau: Array
    shift: ClassVar[str] = "lse"

    def check(self, n, h, hv):
        _check_heads("tau", self.tau, n)

    def row_parameter(self, visible):
        return _as_rows(self.tau) / jnp.maximum(visible, 1)

    def weight(self, scores, shift, row):
        return _visible_relu(scores, jnp.exp(scores - shift) + row)


@register()
class ElasticSurvey(Elementwise):
    """softmax(z / temperature), which is softmax(z) ^ (1 / temperature) normalised. [10, survey]

    Attributes:
      temperature: above 1 flattens.
    """

    temperature: float
    shift: ClassVar[str] = "lse"

    def check(self, n, h, hv):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def weight(self, scores, shift, row):
        # Any shift cancels in the quotient; the log-sum-exp keeps the exponents at 0 or below.
        return jnp.exp((scores - jax.lax.stop_gradient(shift)) / self.temperature)

    def term(self, scores, shift, row):
        return self.weight(scores, shift, row)

    def denominator(self, total, shift):
        return jnp.where(total == 0, 1, total)


@register()
class Sigmoid(Elementwise):
    """sigmoid(z), or sigmoid(z - log i), i keys being visible to the query. [11]

    Attributes:
      is_normalized: whether a row is divided by its sum. [code of Gu et al.]
      has_length_bias: whether log i is subtracted, so that rows start near a sum of 1.
    """

    is_normalized: bool = False
    has_length_bias: bool = False

    def row_parameter(self, visible):
        return -jnp.log(jnp.maximum(visible, 1)) if self.has_length_bias else None

    def weight(self, scores, shift, row):
        return jax.nn.sigmoid(scores if row is None else scores + row)

    def term(self, scores, shift, row):
        return self.weight(scores, shift, row) if self.is_normalized else None

    def denominator(self, total, shift):
        return total + EPSILON


@register()
class Elu1(Elementwise):
    """elu(z) + 1, that is z + 1 above 0 and e^z below. [12, code of Gu et al.]

    Attributes:
      is_normalized: whether a row is divided by its sum.
    """

    is_normalized: bool = True

    def weight(self, scores, shift, row):
        is_above = scores > 0
        above, below = jnp.where(is_above, scores, 0), jnp.where(is_above, 0, scores)
        return jnp.where(is_above, above + 1, jnp.exp(below))

    def term(self, scores, shift, row):
        return self.weight(scores, shift, row) if self.is_normalized else None

    def denominator(self, total, shift):
        return total + EPSILON


@register()
class Kernel(Elementwise):
    """The scores themselves, phi(query) . phi(key), as weights. [13, code of Gu et al.]

    Queries and keys go through `kernel_features` first.

    Attributes:
      divisor: of a row with sum x: "bounded" max(|x|, 1), for features of any sign; "sum" x +
        epsilon, for positive features; "none".
    """

    divisor: str = "bounded"
    is_signed: ClassVar[bool] = True

    def check(self, n, h, hv):
        if self.divisor not in ("bounded", "sum", "none"):
            raise ValueError(f"divisor {self.divisor!r} is none of 'bounded', 'sum', 'none'")

    def weight(self, scores, shift, row):
        return jnp.where(scores > -jnp.inf, scores, 0)

    def term(self, scores, shift, row):
        return None if self.divisor == "none" else self.weight(scores, shift, row)

    def denominator(self, total, shift):
        if self.divisor == "sum":
            return total + EPSILON
        return jnp.maximum(jnp.abs(total), 1)


FEATURES: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "elu1": lambda x: jax.nn.elu(x) + 1,
}
"""Feature maps of `kernel_features` by name."""


def kernel_features(
    query: Array, key: Array, feature: str | Callable[[Array], Array] = "elu1"
) -> tuple[Array, Array]:
    """Map queries and keys for `Kernel`.

    Args:
      query: `[b,t,n,h]`.
      key: `[b,s,k,h]`.
      feature: a name in `FEATURES`, or a function of the last axis shared by both (such as a small
        network); it may change the width.

    Returns:
      The mapped query and key. The default scale of `attention` becomes that of the new width.

    Raises:
      ValueError: the name is unknown.
    """
    if isinstance(feature, str):
        if feature not in FEATURES:
            raise ValueError(f"feature {feature!r} is unknown; choose from {list(FEATURES)}")
        feature = FEATURES[feature]
    return feature(query), feature(key)


def integral(queries: Array, keys: Array) -> tuple[Array, Array]:
    """Join sampled queries and keys so that one softmax sees their mean scores. [14, survey]

    mean_m(q_m . k_m) = (concat_m q_m) . (concat_m k_m) / m

    Args:
      queries: `[m,b,t,n,h]`, m samples.
      keys: `[m,b,s,k,h]`.

    Returns:
      query `[b,t,n,m*h]` and key `[b,s,k,m*h]` for `attention(..., scale=h ** -0.5)`.

    Raises:
      ValueError: the numbers of samples differ.
    """
    if queries.ndim != 5 or keys.ndim != 5 or queries.shape[0] != keys.shape[0]:
        raise ValueError(f"need [m,b,t,n,h] and [m,b,s,k,h], got {queries.shape} and {keys.shape}")
    join = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:4], -1)
    return join(queries) / queries.shape[0], join(keys)


def _visible_relu(scores, x):
    """relu(x), exactly zero where masked whatever was added there."""
    return jnp.where((x > 0) & (scores > -jnp.inf), x, 0)


def _as_rows(parameter):
    return jnp.reshape(jnp.asarray(parameter), (1, -1, 1))


def _check_heads(name, parameter, n):
    shape = jnp.shape(parameter)
    if shape not in ((), (1,), (n,)):
        raise ValueError(f"{name} must be one number or [n] = ({n},), got {shape}")
