# SPDX-License-Identifier: Apache-2.0
"""The template that every token mixer fills in: bias, values, a mixing matrix, an output.

    Xh = bias(X)        V = Xh W^v        Y = phi(M(Xh) V)

X [b,t,d] and Xh are [paper symbols] of He and Kabic, "A Unified View of Long-Sequence Models
towards Modeling Million-Scale Dependencies", arXiv 2302.06218: X is the input, X-hat the input with
positional information. That a mixer is a dense matrix M over positions is how its nomenclature
reads (Gram matrix G, Fourier matrix F^s, convolution matrix W^c). Splitting V into heads, one
matrix for each head, the output map in phi and the costs are [our design]: only the paper's
abstract and nomenclature were available, so nothing here claims to be its table of models.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnjax.ops import mask as masks
from attnjax.ops.mask import Mask
from attnjax.ops.positions import rotate, sinusoids
from attnjax.typing import Array, Params, PRNGKey

BIASES = ("identity", "sinusoid", "learnt", "rotary")
"""How positions enter; "rotary" acts on queries and keys, so only mixers that have them take it."""

_LINEAR = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
_OUT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer:
    """One family of the template: pure functions of parameters and inputs, and what they cost.

    Subclasses say how values are mixed (`mix`) and, where there is one, the matrix that does the
    same (`dense_matrix`): `mix(params, x) == dense_matrix(params, x) @ values(params, x)`.
    """

    is_data_dependent: ClassVar[bool] = True
    """Whether the matrix depends on the input."""
    is_exact: ClassVar[bool] = True
    """Whether the family computes its definition, not an approximation of softmax attention."""
    projections: ClassVar[tuple[str, ...]] = ("value", "out")
    """Learnt maps between model width and heads."""

    @property
    def is_causal(self) -> bool:
        """Whether an output depends on no later input."""
        return getattr(self, "causal", False)

    def init(self, key: PRNGKey, length: int, dim: int, heads: int) -> Params:
        """Return new parameters.

        Args:
          key: typed random key.
          length: t, sequence length; only some families have parameters of that size.
          dim: d, model width.
          heads: n; divides d.

        Returns:
          A dict of arrays (float32): `query`, `key`, `value` with `kernel [d,n,h]`, `out` with
          `kernel [n,h,d]`, as far as the family has them, and its own.

        Raises:
          ValueError: the heads do not divide the width, or the length does not suit the family.
        """
        if heads < 1 or dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        own_key, *keys = jax.random.split(key, 1 + len(self.projections))
        params = {}
        for name, k in zip(self.projections, keys, strict=True):
            shape = (dim, heads, dim // heads)
            if name == "out":
                params[name] = {"kernel": _OUT(k, (*shape[1:], dim), jnp.float32)}
            else:
                params[name] = {"kernel": _LINEAR(k, shape, jnp.float32)}
        return params | self.own_params(own_key, length, dim, heads)

    def own_params(self, key: PRNGKey, length: int, dim: int, heads: int) -> Params:
        """Return the parameters besides the projections; see `init`."""
        del key, length, dim, heads
        return {}

    def values(self, params: Params, x: Array, valid: Array | None = None) -> Array:
        """Return V = Xh W^v `[b,t,n,h]`, zero at padding."""
        return masked(project(params, "value", x), valid)

    def mix(self, params: Params, x: Array, valid: Array | None = None) -> Array:
        """Return M V `[b,t,n,h]` without M, as far as the family has a cheaper way."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it mixes")

    def dense_matrix(self, params: Params, x: Array, valid: Array | None = None) -> Array | None:
        """Return M `[b|1,n|1,t,s]`, for inspection of short sequences; None if there is none."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its matrix is")

    def finish(self, params: Params, mixed: Array) -> Array:
        """Return phi `[b,t,d]` of the mixed values `[b,t,n,h]`: here the output projection."""
        kernel_nhd = params["out"]["kernel"].astype(mixed.dtype)
        return jnp.einsum("btnh,nhd->btd", mixed, kernel_nhd)

    def apply(self, params: Params, x: Array, valid: Array | None = None) -> Array:
        """Mix the tokens of a batch of sequences.

        Args:
          params: from `init`.
          x: Xh, `[b,t,d]` floating.
          valid: bool `[b,t]`, False at padding, which then influences nothing; all valid if None.

        Returns:
          Y, `[b,t,d]` in the dtype of x.

        Raises:
          ValueError: the length is not the one the parameters were made for.
        """
        return self.finish(params, self.mix(params, x, valid)).astype(x.dtype)

    def flops(self, length: int, dim: int, heads: int) -> float:
        """Count the operations of one example's forward pass; a multiply-add is two."""
        projected = 2.0 * length * dim * dim * len(self.projections)
        return projected + self.mixing_flops(length, dim, heads)

    def mixing_flops(self, length: int, dim: int, heads: int) -> float:
        """Count the operations of `mix` without projections."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it costs")

    def activation_bytes(self, length: int, dim: int, heads: int) -> float:
        """Estimate what one example's backward pass keeps, in bytes of float32.

        The input, the result of every projection, the mixed values, and `mixing_numbers`.
        """
        numbers = length * dim * (2 + len(self.projections))
        return 4.0 * (numbers + self.mixing_numbers(length, dim, heads))

    def mixing_numbers(self, length: int, dim: int, heads: int) -> float:
        """Count the numbers that the backward pass of `mix` keeps besides."""
        del length, dim, heads
        return 0.0

    def path_length(self, length: int) -> int | None:
        """Return how many steps carry information between the two ends of a sequence.

        A step is a layer, or a step of the recurrence of families that have one; it is an upper
        bound. None: no number of layers is guaranteed to.
        """
        del length
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """A mixer with queries and keys.

    Attributes:
      rotary: rotate queries and keys by their positions.
    """

    projections: ClassVar[tuple[str, ...]] = ("query", "key", "value", "out")

    rotary: bool = False

    def mix(self, params, x, valid=None):
        query_btnh, key_bsnh = self.queries_keys(params, x)
        value_bsnh = self.values(params, x, valid)
        return self.attend(params, query_btnh, key_bsnh, value_bsnh, valid)

    def dense_matrix(self, params, x, valid=None):
        return self.weights(params, *self.queries_keys(params, x), valid)

    def queries_keys(self, params: Params, x: Array) -> tuple[Array, Array]:
        """Return queries and keys, each `[b,t,n,h]`."""
        pair = (project(params, "query", x), project(params, "key", x))
        if not self.rotary:
            return pair
        positions = jnp.arange(x.shape[1])
        return tuple(rotate(part, positions) for part in pair)

    def attend(
        self, params: Params, query: Array, key: Array, value: Array, valid: Array | None
    ) -> Array:
        """Return M V `[b,t,n,h]` of queries, keys and values of that shape."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it attends")

    def weights(self, params: Params, query: Array, key: Array, valid: Array | None) -> Array:
        """Return M `[b,n,t,s]` float32."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its weights are")


def project(params: Params, name: str, x: Array) -> Array:
    """Map `x [b,t,d]` to the heads `[b,t,n,h]` of a projection."""
    kernel_dnh = params[name]["kernel"].astype(x.dtype)
    return jnp.einsum("btd,dnh->btnh", x, kernel_dnh)


def matrix_times(matrix_bnts: Array, value_bsnh: Array) -> Array:
    """Return M V `[b,t,n,h]` for `matrix [b|1,n|1,t,s]` and `value [b,s,n,h]`."""
    b, _, n, _ = value_bsnh.shape
    matrix_bnts = jnp.broadcast_to(matrix_bnts, (b, n, *matrix_bnts.shape[2:]))
    return jnp.einsum("bnts,bsnh->btnh", matrix_bnts, value_bsnh)


def inductive_bias(kind: str, x: Array, table: Array | None = None) -> Array:
    """Return Xh = bias(X): X with positional information.

    Args:
      kind: one of `BIASES`; "identity" and "rotary" leave X as it is.
      x: X, `[b,t,d]`.
      table: `[>=t,d]`, learnt vectors (kind "learnt").

    Returns:
      `[b,t,d]` in the dtype of x.

    Raises:
      ValueError: the kind is unknown, or the table is missing or too short.
    """
    if kind not in BIASES:
        raise ValueError(f"bias {kind!r} is unknown; choose from {', '.join(BIASES)}")
    _, t, d = x.shape
    if kind == "sinusoid":
        return x + sinusoids(jnp.arange(t), d).astype(x.dtype)
    if kind == "learnt":
        if table is None or table.shape[0] < t or table.shape[1] != d:
            shape = None if table is None else table.shape
            raise ValueError(f"bias 'learnt' needs a table of at least [{t},{d}], got {shape}")
        return x + table[:t].astype(x.dtype)
    return x


def check_length(x: Array, length: int, owner: Any) -> None:
    """Refuse a sequence of another length than the parameters were made for.

    Raises:
      ValueError: names both lengths.
    """
    if x.shape[1] != length:
        raise ValueError(
            f"{type(owner).__name__} has parameters for sequences of {length} tokens, got "
            f"{x.shape[1]}"
        )


def check_positive(owner: Any, *names: str) -> None:
    """Refuse fields below 1.

    Raises:
      ValueError: names the field and its value.
    """
    for name in names:
        if getattr(owner, name) < 1:
            raise ValueError(f"{name}={getattr(owner, name)}: must be at least 1")


def without_padding(mask: Mask, valid: Array | None) -> Mask:
    """Hide the keys where `valid [b,s]` is False."""
    return mask if valid is None else mask & masks.array(valid[:, None, None, :])


def masked(x, valid):
    """Zero `x [b,t,...]` where `valid [b,t]` is False."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros_like(x))
