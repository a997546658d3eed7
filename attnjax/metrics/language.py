# SPDX-License-Identifier: Apache-2.0
"""Perplexity and bits per byte: two ways to write a mean negative log-likelihood."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp

from attnjax.metrics.mean import Mean
from attnjax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perplexity(Mean):
    """exp of the mean of negative log-likelihoods in nats."""

    def compute(self) -> float:
        """Return the perplexity; infinity where it leaves the floats."""
        mean = super().compute()
        return math.inf if mean > 700 else math.exp(mean)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitsPerByte(Mean):
    """Sum of negative log-likelihoods in bits, over the number of bytes."""

    @classmethod
    def from_losses(cls, nll: Array, valid: Array, bytes_per_token: float) -> Self:
        """Sum the tokens of a batch.

        Args:
          nll: `[b,t]` nats.
          valid: bool `[b,t]`.
          bytes_per_token: mean length of a token, above 0.

        Raises:
          ValueError: the shapes differ, or the length is not above 0.
        """
        if not bytes_per_token > 0:
            raise ValueError(f"bytes_per_token={bytes_per_token}: must be above 0")
        sums = Mean.of(nll, valid=valid)
        weight = sums.weight.astype(jnp.float32) * (bytes_per_token * math.log(2))
        return cls(sums.total, weight)
