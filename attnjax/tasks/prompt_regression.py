# SPDX-License-Identifier: Apache-2.0
"""Regression in context: the mean squared error of answers to a query."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.analysis.icl_linear_regression import circuits
from attnjax.errors import RecipeError
from attnjax.metrics import Mean, Metric
from attnjax.tasks.model_task import ModelTask
from attnjax.typing import Array, Batch, Params, PRNGKey


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReplicaMedian:
    """Median over replicas of a mean over prompts.

    Attributes:
      total: `[r]` sums.
      weight: scalar, what they are divided by.
    """

    total: Array
    weight: Array

    def merge(self, other: Self) -> Self:
        """Return the state of both batches together."""
        return type(self)(self.total + other.total, self.weight + other.weight)

    def compute(self) -> float:
        """Return the median; NaN if nothing was counted."""
        weight = float(self.weight)
        return float(np.median(np.asarray(self.total)) / weight) if weight else float("nan")


class PromptRegression(ModelTask):
    """Predict `target [b,p,o]` float32 from the examples of a prompt; see `data.regression`.

    All replicas of a model see the same prompts. The loss is the sum of theirs, so that each is
    trained as if it were alone.
    """

    targets = ("target",)
    free_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"examples": (2,)}

    def __init__(self, model: Any):
        """Bind a model to the task.

        Args:
          model: Linen module with `dim`, `outputs`, `heads`, `replicas` and an output `prediction
            [b,p,r,o]`, such as `models.regression_attention.RegressionAttention`.

        Raises:
          RecipeError: the model predicts nothing of that kind.
        """
        for name in ("dim", "outputs", "heads", "replicas"):
            if not hasattr(model, name):
                raise RecipeError(f"task prompt_regression: {type(model).__name__} has no {name}")
        super().__init__(model)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        inputs = self.model.example(batch)
        shape = (*inputs["query"].shape[:2], self.model.outputs)
        return inputs | {"target": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries or prompts of another law.

        Raises:
          RecipeError: names the entry and both shapes.
        """
        self.check_names(batch)
        width = self.model.dim + self.model.outputs
        found = {name: np.shape(batch[name]) for name in self.inputs}
        b, p = found["query"][:2]
        s = found["examples"][2] if len(found["examples"]) == 4 else 0
        expected = {
            "examples": (b, p, s, width),
            "query": (b, p, width),
            "target": (b, p, self.model.outputs),
        }
        for name, shape in expected.items():
            if found[name] != shape:
                raise RecipeError(
                    f"{name} has shape {found[name]}, a model with dim={self.model.dim} and "
                    f"outputs={self.model.outputs} reads {shape}"
                )

    def _errors(self, params, batch):
        """Return squared errors `[b, p, r]`, means over the answers."""
        prediction_bpro = self._apply(params, batch).prediction
        return jnp.mean(jnp.square(prediction_bpro - batch["target"][:, :, None]), axis=-1)

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the sum over replicas of mean squared errors.

        Returns:
          The loss; and `mse`, the mean over replicas, with `omega_R_H` and `mu_R_H`, what replica R
          and its head H are in the theory, so that metrics.jsonl holds the dynamics.
        """
        del key, step
        errors_bpr = self._errors(params, batch)
        pattern = circuits.measure(circuits.of_params(params))
        heads = {
            f"{name}_{replica}_{head}": getattr(pattern, name)[replica, head]
            for name in ("omega", "mu")
            for replica in range(self.model.replicas)
            for head in range(self.model.heads)
        }
        return jnp.sum(jnp.mean(errors_bpr, axis=(0, 1))), {"mse": jnp.mean(errors_bpr), **heads}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of errors and, of the parameters, how near they are to the theory.

        Returns:
          `mse`, mean over replicas; medians over replicas: `median_mse`, `diagonal_ratio`,
          `answer_ratio`, `imbalance`; and `opposite`, the share of replicas with heads of both
          signs.
        """
        errors_bpr = self._errors(params, batch)
        valid_b = batch.get("valid", jnp.ones(errors_bpr.shape[0], bool))
        weights_bp = jnp.broadcast_to(valid_b[:, None], errors_bpr.shape[:2])
        pattern = circuits.measure(circuits.of_params(params))
        kinds_rn = pattern.kind
        is_opposite_r = jnp.any(kinds_rn > 0, axis=1) & jnp.any(kinds_rn < 0, axis=1)
        count = jnp.sum(weights_bp).astype(jnp.float32)
        states: dict[str, Metric] = {
            "mse": Mean.of(errors_bpr.mean(axis=-1), valid=weights_bp),
            "median_mse": ReplicaMedian(
                jnp.sum(jnp.where(weights_bp[..., None], errors_bpr, 0), axis=(0, 1)), count
            ),
            "opposite": Mean.of(
                jnp.broadcast_to(jnp.mean(is_opposite_r.astype(jnp.float32)), weights_bp.shape),
                valid=weights_bp,
            ),
        }
        for name in ("diagonal_ratio", "answer_ratio", "imbalance"):
            states[name] = ReplicaMedian(getattr(pattern, name) * count, count)
        return states

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `prediction [b,p,r,o]` float32."""
        return {"prediction": self._apply(params, batch).prediction}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,p,r,o]`; there are no maps."""
        return {**self.predict(params, batch), "maps": {}}
