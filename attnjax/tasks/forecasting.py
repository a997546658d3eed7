# SPDX-License-Identifier: Apache-2.0
"""Forecasting: the mean squared error of all steps to come, in standardised values."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.metrics import Mean, Metric
from attnjax.nn.pattern_attention import RANDOM
from attnjax.tasks.model_task import ModelTask
from attnjax.typing import Array, Batch, Params, PRNGKey


class Forecasting(ModelTask):
    """Forecast `future [b,h,c]` float32 from a past.

    The batch holds the model's inputs and, with `denormalised`, `mean [b,c]` and `scale [b,c]`,
    with which `value * scale + mean` is in the units of the data; in evaluation, `valid [b]` bool.
    """

    def __init__(self, model: Any, *, denormalised: bool = False):
        """Bind a model to the task.

        Args:
          model: Linen module with `horizon`, `channels` and an output `forecast [b,h,c]`, such as
            `models.informer.Informer`.
          denormalised: measure errors, and predict, in the units of the data, too. The loss stays
            that of standardised values.

        Raises:
          RecipeError: the model forecasts nothing.
        """
        for name in ("horizon", "channels"):
            if not hasattr(model, name):
                raise RecipeError(
                    f"task forecasting: {type(model).__name__} is no forecaster: it has no {name}"
                )
        super().__init__(model)
        self.denormalised = denormalised
        self.targets = ("future", "mean", "scale") if denormalised else ("future",)

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        h, c = self.model.horizon, self.model.channels
        shapes = {"future": (batch, h, c), "mean": (batch, c), "scale": (batch, c)}
        targets = {name: jax.ShapeDtypeStruct(shapes[name], jnp.float32) for name in self.targets}
        return self.model.example(batch) | targets

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, other shapes, or numbers that are not finite.

        Raises:
          RecipeError: names the entry and both shapes, or the row.
        """
        self.check_names(batch)
        for name, expected in self.example(len(batch["future"])).items():
            array = np.asarray(batch[name])
            if array.shape != expected.shape:
                raise RecipeError(
                    f"{name} has shape {array.shape}, the model and task read {expected.shape}"
                )
            finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if not finite.all():
                raise RecipeError(f"{name} of row {np.argmin(finite)} is not finite")

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean squared error of standardised values, and the absolute one as `mae`."""
        del step
        drop, attend = jax.random.split(key)
        output = self._apply(params, batch, train=True, rngs={"dropout": drop, RANDOM: attend})
        error_bhc = output.forecast - batch["future"]
        return jnp.mean(jnp.square(error_bhc)), {"mae": jnp.mean(jnp.abs(error_bhc))}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `mse` and `mae`; `unit_mse`, `unit_mae` in the units of the data."""
        error_bhc = self._apply(params, batch).forecast - batch["future"]
        metrics = self._errors(error_bhc, batch.get("valid"), "")
        if self.denormalised:
            error_bhc = error_bhc * batch["scale"][:, None]
            metrics |= self._errors(error_bhc, batch.get("valid"), "unit_")
        return metrics

    def _errors(self, error_bhc, valid_b, prefix):
        mean = lambda x_bhc: Mean.of(jnp.mean(x_bhc, axis=(1, 2)), valid=valid_b)
        return {
            f"{prefix}mse": mean(jnp.square(error_bhc)),
            f"{prefix}mae": mean(jnp.abs(error_bhc)),
        }

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `prediction [b,h,c]` float32, in the units of the data with `denormalised`."""
        forecast_bhc = self._apply(params, batch).forecast
        return {"prediction": self._in_units(forecast_bhc, batch)}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,h,c]` and the model's attention `maps`."""
        output, captured = self._apply(params, batch, mutable=["attention"])
        return {
            "prediction": self._in_units(output.forecast, batch),
            "maps": self.model.attention_maps(captured),
        }

    def _in_units(self, forecast_bhc, batch):
        if not self.denormalised:
            return forecast_bhc
        return forecast_bhc * batch["scale"][:, None] + batch["mean"][:, None]
