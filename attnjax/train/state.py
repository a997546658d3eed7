# SPDX-License-Identifier: Apache-2.0
"""Everything a training step reads and writes, as one value."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.typing import Array, Params, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    """Running statistics of healthy losses and the length of the current run of bad steps.

    Attributes:
      bad_steps: int32, consecutive skipped steps up to now.
      count: int32, healthy steps seen.
      loss_mean, loss_variance: float32 exponential averages over healthy steps.
    """

    bad_steps: Array
    count: Array
    loss_mean: Array
    loss_variance: Array

    @classmethod
    def zero(cls) -> "GuardState":
        """Return the state before the first step."""
        integer, real = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return cls(integer, integer, real, real)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of a run between two steps.

    Attributes:
      step: int32, number of steps taken (skipped ones included).
      params: trained parameters, float32.
      opt_state: state of the optax optimiser.
      ema: moving average of the parameters, or an empty tuple when it is off.
      key: the run's key; step `i` uses `fold_in(key, i)`, so it never changes.
      guard: see `GuardState`.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params
    key: PRNGKey
    guard: GuardState

    @property
    def averaged(self) -> Params:
        """The parameters to evaluate: the moving average when there is one."""
        return self.params if isinstance(self.ema, tuple) else self.ema
