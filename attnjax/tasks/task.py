# SPDX-License-Identifier: Apache-2.0
"""The contract between a task and the trainer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from attnjax.metrics import Metric
from attnjax.typing import Array, Batch, Params, PRNGKey


@runtime_checkable
class Task(Protocol):
    """What the trainer, the evaluator and the report need to know about a run's learning problem.

    `init`, `loss`, `evaluate`, `predict` and `explain` are pure and can be jitted over a sharded
    batch; `check` looks at arrays on the host.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch entries that `loss` reads."""
        ...

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        ...

    @property
    def free_axes(self) -> Mapping[str, tuple[int, ...]]:
        """Batch entry -> axes that may have another size in evaluation than in training."""
        ...

    @property
    def extras(self) -> Sequence[str]:
        """Names of batch entries that evaluation reads where the data has them."""
        ...

    @property
    def param_axes(self) -> Sequence[tuple[str, tuple[str | None, ...]]]:
        """Pairs of (regular expression on the parameter path, logical axis names)."""
        ...

    @property
    def flops(self) -> float:
        """Floating point operations of one training step per example."""
        ...

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch on which the loss would be meaningless.

        Raises:
          RecipeError: names the entry, the value and the example.
        """
        ...

    def init(self, key: PRNGKey, batch: Mapping[str, Array | jax.ShapeDtypeStruct | Any]) -> Params:
        """Return new parameters; of the batch only names, shapes and dtypes matter."""
        ...

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the scalar float32 training loss and named scalars; `key` is this step's own."""
        ...

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return metric states of a batch, leaving out examples whose `valid` is False."""
        ...

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return the model's answers by name, batch first."""
        ...

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `image`, `label`, `prediction` and `maps` (title -> `[b, y, x]`) for pictures."""
        ...
