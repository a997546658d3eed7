# SPDX-License-Identifier: Apache-2.0
"""Statistics of attention weights that are computed on the way, without the [t, s] matrix.

With weights p[b,n,t,s] of softmax or one of its relatives (before dropout):

    key_mass          [b,n,s]   sum_t p                 what a key receives
    entropy           [b,n,t]   -sum_s p log p          in nats
    max_probability   [b,n,t]   max_s p
    first_token_mass  [b,n,t]   p of key 0
    TokenMass         [b,n,t]   sum_s p indicator[b,s]  what a set of tokens receives

All are float32. Rows that may attend nothing give 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.typing import Array

STATISTICS = ("key_mass", "entropy", "max_probability", "first_token_mass")
"""Names that `attention(statistics=...)` accepts besides `TokenMass`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMass:
    """The mass that a set of keys receives from every query.

    Attributes:
      indicator: `[b|1, s]` bool or floating; 1 for members (or any weight).
      name: key of the result.
    """

    indicator: Any
    name: str = dataclasses.field(default="token_mass", metadata={"static": True})

    def check(self, b: int, s: int) -> None:
        """Raise ValueError if the indicator is not for b examples of s keys."""
        shape = self.indicator.shape
        if len(shape) != 2 or shape[0] not in (1, b) or shape[1] != s:
            raise ValueError(f"indicator of {self.name!r} must be [b,s] = ({b}, {s}), got {shape}")


def name_of(statistic: str | TokenMass) -> str:
    """Return the key under which a statistic is returned."""
    return statistic.name if isinstance(statistic, TokenMass) else statistic


def from_probabilities(
    probabilities: Array, statistics: Sequence[str | TokenMass]
) -> dict[str, Array]:
    """Compute statistics from explicit weights: the definition that streaming must equal.

    Args:
      probabilities: `[b,n,t,s]`.
      statistics: names in `STATISTICS` or `TokenMass`es.

    Returns:
      Arrays by name, without gradient.
    """
    p_bnts = jax.lax.stop_gradient(probabilities.astype(jnp.float32))
    results = {}
    for statistic in statistics:
        if isinstance(statistic, TokenMass):
            indicator = statistic.indicator.astype(jnp.float32)
            value = jnp.einsum(
                "bnts,bs->bnt",
                p_bnts,
                jnp.broadcast_to(indicator, (p_bnts.shape[0], p_bnts.shape[3])),
                precision="highest",
            )
        elif statistic == "key_mass":
            value = p_bnts.sum(axis=2)
        elif statistic == "entropy":
            value = jax.scipy.special.entr(p_bnts).sum(axis=-1)
        elif statistic == "max_probability":
            value = p_bnts.max(axis=-1)
        else:
            value = p_bnts[..., 0]
        results[name_of(statistic)] = value
    return results
