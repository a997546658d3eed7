# SPDX-License-Identifier: Apache-2.0
"""Completion of clouds of points: chamfer distance of a coarse and a fine answer to the truth."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.losses.points import chamfer_l1, chamfer_l2
from attnjax.metrics import Mean, Metric, f_score
from attnjax.nn.pattern_attention import RANDOM
from attnjax.ops.points import chamfer_distances
from attnjax.tasks.model_task import ModelTask
from attnjax.typing import Array, Batch, Params, PRNGKey

SCALE = 1000.0
"""Factor of chamfer distances as metrics, as in the literature."""


class Completion(ModelTask):
    """Recover `complete [b,m,3]` float32 from `partial [b,n,3]`.

    loss = CD-l1(coarse, complete) + CD-l1(fine, complete)

    In evaluation the batch also holds `valid [b]` bool.
    """

    targets = ("complete",)

    def __init__(
        self,
        model: Any,
        *,
        complete_points: int = 16_384,
        threshold: float = 0.01,
        block: int = 1024,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module whose output has `coarse` and `fine`, such as `models.pointr.PoinTr`.
          complete_points: m, points of a complete cloud.
          threshold: distance at which the F-score counts points as found.
          block: side of the tiles of distances that exist at the same time.

        Raises:
          RecipeError: a value is out of range, or the model reads no partial clouds.
        """
        for name, value, fine in (
            ("complete_points", complete_points, complete_points >= 1),
            ("threshold", threshold, threshold > 0),
            ("block", block, block >= 1),
        ):
            if not fine:
                raise RecipeError(f"task.{name}={value!r} is out of range")
        super().__init__(model)
        if self._model_inputs != ("partial",):
            raise RecipeError(
                f"task completion: {type(model).__name__} reads {', '.join(self._model_inputs)}, "
                "not partial clouds"
            )
        self.complete_points, self.threshold, self.block = complete_points, threshold, block

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        shape = (batch, self.complete_points, 3)
        return {**self.model.example(batch), "complete": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, other shapes, or points that are not finite.

        Raises:
          RecipeError: names the entry and both shapes, or the row.
        """
        self.check_names(batch)
        for name, expected in self.example(len(batch["complete"])).items():
            array = np.asarray(batch[name])
            if array.shape != expected.shape:
                raise RecipeError(
                    f"{name} has shape {array.shape}, the model and task read {expected.shape}"
                )
            finite = np.isfinite(array).all(axis=(1, 2))
            if not finite.all():
                raise RecipeError(f"{name} of row {np.argmin(finite)} is not finite")

    def _distances(self, cloud, batch):
        return chamfer_distances(cloud, batch["complete"], block=self.block)

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return both chamfer distances added, and each as `coarse` and `fine`, times 1,000."""
        del step
        output = self._apply(params, batch, train=True, rngs={RANDOM: key})
        coarse, fine = (
            jnp.mean(chamfer_l1(*self._distances(cloud, batch)))
            for cloud in (output.coarse, output.fine)
        )
        return coarse + fine, {"coarse": SCALE * coarse, "fine": SCALE * fine}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `cd_l1` and `cd_l2`, times 1,000, and `f_score` of the fine answer."""
        there, back = self._distances(self._apply(params, batch).fine, batch)
        values = {
            "cd_l1": SCALE * chamfer_l1(there, back),
            "cd_l2": SCALE * chamfer_l2(there, back),
            "f_score": f_score(there, back, self.threshold),
        }
        return {name: Mean.of(x_b, valid=batch.get("valid")) for name, x_b in values.items()}

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `prediction [b,p,3]`, the fine answer, and `coarse [b,q,3]`, both float32."""
        output = self._apply(params, batch)
        return {"prediction": output.fine, "coarse": output.coarse}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,p,3]` and the model's attention `maps`."""
        output, captured = self._apply(params, batch, mutable=["attention"])
        return {"prediction": output.fine, "maps": self.model.attention_maps(captured)}
