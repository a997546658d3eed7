# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-head attention as modules: a router, and rotary attention whose heads it weighs.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842; what is
computed is `attnjax.ops.head_routing`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attnjax.errors import RecipeError
from attnjax.nn.attend import attend
from attnjax.nn.initializers import LINEAR
from attnjax.nn.text import RotaryAttention, starts
from attnjax.ops.head_routing import (
    HeadGates,
    attend_chosen,
    check_heads,
    head_capacity,
    mixture_gates,
    query_gates,
)
from attnjax.ops.mask import Mask
from attnjax.recipe import check_arguments
from attnjax.registry import nearest
from attnjax.typing import Array

ROUTERS = ("learnt", "queries")
"""Linear scores of the token; or the sizes of its queries, without parameters."""

COMPUTES = ("dense", "sparse")
"""All heads work, and what was not chosen counts 0; or they work for the tokens that chose them."""


@dataclasses.dataclass(frozen=True)
class HeadMixture:
    """The numbers of a mixture of heads.

    Attributes:
      shared: heads that are always on, the first ones.
      top_k: heads that a token chooses among the others.
      router: member of `ROUTERS`.
      compute: member of `COMPUTES`.
      capacity: with "sparse", places of a head as a multiple of its even share of the tokens; what
        finds none gives zero.
      balance: weight of the balance loss, of which the mean over layers counts.
    """

    shared: int
    top_k: int
    router: str = "learnt"
    compute: str = "dense"
    capacity: float = 1.25
    balance: float = 0.01

    def __post_init__(self):
        for name, known in (("router", ROUTERS), ("compute", COMPUTES)):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise RecipeError(f"heads.{name}={found!r}: {nearest(found, known)}")
        for name, fine in (("capacity", self.capacity > 0), ("balance", self.balance >= 0)):
            if not fine:
                raise RecipeError(f"heads.{name}={getattr(self, name)} is out of range")

    @classmethod
    def of(cls, values: "Mapping[str, Any] | HeadMixture", num_heads: int) -> "HeadMixture":
        """Return options from a recipe's dict, for a model with n heads.

        Raises:
          RecipeError: a name is unknown, a value out of range, or heads do not go together.
        """
        if not isinstance(values, cls):
            check_arguments(cls, values, "model.attention")
            values = cls(**values)
        try:
            check_heads(num_heads, values.shared, values.top_k)
            if values.router == "queries" and num_heads - values.shared < 2:
                raise ValueError("the router by queries needs two routed heads at least")
        except ValueError as error:
            raise RecipeError(f"model.attention: {error}") from error
        return values


class HeadRouter(nn.Module):
    """Scores of heads as linear maps of a token, without biases, in float32.

    Their names in the release: `routed` is wg, `types` wg_0, `shared` wg_1; each exists where it is
    needed only.

    Attributes:
      num_heads: n.
      mixture: the numbers.
      kernel_init: draws the matrices.
    """

    num_heads: int
    mixture: HeadMixture
    kernel_init: Callable[..., Array] = LINEAR

    @nn.compact
    def __call__(self, x: Array, query: Array, valid: Array | None = None) -> HeadGates:
        """Choose heads.

        Args:
          x: `[b, t, d]`, what queries are made of.
          query: `[b, t, n, h]`, before rotary positions.
          valid: bool `[b, t]`, tokens that count for the balance; all if None.

        Returns:
          A `HeadGates`.
        """
        shared, top_k = self.mixture.shared, self.mixture.top_k
        if self.mixture.router == "queries":
            return query_gates(query, top_k=top_k, num_shared=shared, valid=valid)
        b, t, _ = x.shape
        if self.num_heads == shared == 1:
            ones = jnp.ones((b, t, 1), jnp.float32)
            return HeadGates(ones, ones > 0, jnp.zeros((), jnp.float32))
        experts = self.num_heads - shared

        def scores(name, size, is_needed):
            dense = nn.Dense(size, use_bias=False, kernel_init=self.kernel_init, name=name)
            return dense(x.astype(jnp.float32)) if is_needed else None

        return mixture_gates(
            scores("routed", experts, experts > 0),
            scores("shared", shared, shared > 1),
            scores("types", 2, shared > 0 and experts > 0),
            top_k=top_k, num_shared=shared, valid=valid,
        )  # fmt: skip


def weigh_heads(out: Array, gates: HeadGates) -> Array:
    """Return `out [b,t,n,h]` times the gates, in its dtype; what the output projection reads."""
    return out * gates.gates[..., None].astype(out.dtype)


def mix_heads(
    query: Array,
    key: Array,
    value: Array,
    gates: HeadGates,
    mixture: HeadMixture,
    *,
    implementation: str | None = None,
    **options: Any,
) -> tuple[Any, Array]:
    """Attend from all tokens to all, and weigh heads.

    Options of `ops.attention`, such as probabilities that are asked for, make all heads work.

    Args:
      query: `[b,t,n,h]`.
      key, value: `[b,s,n,h]`.
      gates: of these heads.
      mixture: the numbers they were made with.
      implementation: passed to `nn.attend`.
      **options: of `ops.attention`.

    Returns:
      What `nn.attend` returns, its heads weighed; and the share of choices without a place.
    """
    if mixture.compute == "dense" or not mixture.top_k or options:
        result = attend(query, key, value, implementation=implementation, **options)
        dropped = jnp.zeros((), jnp.float32)
        if dataclasses.is_dataclass(result):
            return dataclasses.replace(result, out=weigh_heads(result.out, gates)), dropped
        return weigh_heads(result, gates), dropped
    out, dropped = attend_sparsely(query, key, value, gates, mixture, implementation=implementation)
    return weigh_heads(out, gates), dropped


def attend_sparsely(
    query: Array,
    key: Array,
    value: Array,
    gates: HeadGates,
    mixture: HeadMixture,
    *,
    mask: Mask | None = None,
    bounds: tuple[Array, Array] | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Attend with shared heads from all tokens, with the others from those that chose them.

    Args:
      query: `[b,t,n,h]`.
      key, value: `[b,s,k,h]`; k divides n.
      gates: of the n heads.
      mixture: the numbers they were made with.
      mask: what queries see; None: everything.
      bounds: the same for the routed heads, `first` and `last` of `ops.head_routing.attend_chosen`.
      implementation: passed to `nn.attend`.

    Returns:
      `[b,t,n,h]`, heads not weighed, and the share of choices without a place.
    """
    shared, (_, t, n, _) = mixture.shared, query.shape
    group = n // key.shape[2]

    def part(begin, end):
        """Heads from one to another; those that share keys stay together where that is possible."""
        if begin % group or end % group:
            own = [jnp.repeat(x, group, axis=2)[:, :, begin:end] for x in (key, value)]
        else:
            own = [x[:, :, begin // group : end // group] for x in (key, value)]
        return query[:, :, begin:end], *own

    first, last = bounds or (None, None)
    out, dropped = attend_chosen(
        *part(shared, n), gates.chosen[:, :, shared:], first=first, last=last,
        capacity=head_capacity(t, n - shared, mixture.top_k, mixture.capacity),
        implementation=implementation,
    )  # fmt: skip
    if shared:
        always = attend(*part(0, shared), mask=mask, implementation=implementation)
        out = jnp.concatenate([always, out], axis=2)
    return out, dropped


class MixtureAttention(RotaryAttention):
    """`RotaryAttention` whose heads are weighed for every token before the output projection.

    Measures are float32 scalars: `balance_loss`, `penalty`, its weighted part of the layers' mean,
    and `dropped`, the share of choices without a place.

    Attributes:
      mixture: the numbers.
      depth: layers of the model.
    """

    mixture: HeadMixture | None = None
    depth: int = 1

    def mix_for(
        self,
        x: Array,
        query: Array,
        key: Array,
        value: Array,
        positions: Array,
        segments: Array | None,
        lengths: Array | None,
        cache: Any,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Average values and weigh heads; arguments and results as in `RotaryAttention.mix`."""
        mixture, (_, t, n, _) = self.mixture, query.shape
        valid = None if segments is None else segments > 0
        if lengths is not None:
            valid = jnp.arange(t) < lengths[:, None]
        gates = HeadRouter(n, mixture, name="router")(x, query, valid)
        dropped = jnp.zeros((), jnp.float32)
        if mixture.compute == "sparse" and cache is None and mixture.top_k:
            place = jnp.arange(t, dtype=jnp.int32)[None]
            first = jnp.zeros_like(place) if segments is None else place - starts(segments)
            if self.window is not None:
                first = jnp.maximum(first, place - self.window + 1)
            out, dropped = attend_sparsely(
                self.turn(query, positions), self.turn(key, positions), value, gates, mixture,
                mask=self._mask(segments), bounds=(first, place + 1),
                implementation=self.implementation,
            )  # fmt: skip
        else:
            out, cache, _ = self.mix(query, key, value, positions, segments, lengths, cache)
        measures = {
            "balance_loss": gates.balance_loss,
            "penalty": mixture.balance * gates.balance_loss / self.depth,
            "dropped": dropped,
        }
        return weigh_heads(out, gates), cache, measures
