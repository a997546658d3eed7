# SPDX-License-Identifier: Apache-2.0
"""What all tasks around one Linen model share: parameters, inputs, sharding, costs."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.typing import Params, PRNGKey

TRAIN_TO_FORWARD = 3.0
"""The backward pass does twice the forward work; recomputation does not count as useful work."""


def row_name(batch: Mapping[str, Any], row: int) -> str:
    """Return what to call a row of a host batch: by the example's index where that is known."""
    return f"example {int(batch['index'][row])}" if "index" in batch else f"row {row}"


def check_picture(name: str, array: np.ndarray, expected: jax.ShapeDtypeStruct) -> None:
    """Refuse pictures of another size or dtype than the model's; their number does not matter.

    Raises:
      RecipeError: names the entry, and both shapes and dtypes.
    """
    if array.shape[1:] != expected.shape[1:] or array.dtype != expected.dtype:
        raise RecipeError(
            f"{name!r} is {array.dtype}{list(array.shape)}, but the model expects "
            f"{expected.dtype}[b, {', '.join(map(str, expected.shape[1:]))}]"
        )


def check_labels(batch: Mapping[str, Any], classes: int, counts: np.ndarray | bool = True) -> None:
    """Refuse the `label` of a host batch unless they are integers `[b]` of known classes.

    Args:
      batch: with `label`.
      classes: their number.
      counts: bool `[b]`, rows whose label matters; all by default.

    Raises:
      RecipeError: names dtype and shape, or the label and its example.
    """
    labels = np.asarray(batch["label"])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise RecipeError(f"label must be [b] integers, not {labels.dtype} of shape {labels.shape}")
    wrong = ((labels < 0) | (labels >= classes)) & counts
    if wrong.any():
        first = int(np.argmax(wrong))
        raise RecipeError(
            f"label {int(labels[first])} of {row_name(batch, first)} is outside 0 to "
            f"{classes - 1}: model.num_classes={classes} does not fit this data"
        )


class ModelTask:
    """A model and the names of what it reads. Subclasses add loss, metrics and predictions.

    Attributes:
      model: the Linen module.
    """

    model: Any
    targets: tuple[str, ...] = ()
    """Batch entries that `loss` reads besides the model's inputs."""
    free_axes: Mapping[str, tuple[int, ...]] = {}
    """Batch entry -> axes that may have another size in evaluation than in training."""
    extras: tuple[str, ...] = ()
    """Batch entries that evaluation reads where the data has them."""

    def __init__(self, model: Any):
        """Bind a model: a Linen module with `example` and `flops`."""
        self.model = model
        self._model_inputs = tuple(model.example(1))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch entries that `loss` reads."""
        return (*self._model_inputs, *self.targets)

    @property
    def param_axes(self) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
        """The model file's `PARAM_AXES`, empty where the default rules do."""
        return tuple(getattr(inspect.getmodule(type(self.model)), "PARAM_AXES", ()))

    @property
    def flops(self) -> float:
        """Training operations per example: forward and backward, without recomputation."""
        return TRAIN_TO_FORWARD * float(self.model.flops())

    def check_names(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch with missing entries.

        Raises:
          RecipeError: names them.
        """
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            raise RecipeError(
                f"the data has no {', '.join(missing)}: the model and task read "
                f"{', '.join(self.inputs)}, the batch holds {', '.join(sorted(batch))}"
            )

    def init(self, key: PRNGKey, batch: Mapping[str, Any]) -> Params:
        """Return new parameters; of the batch only the shapes and dtypes of the inputs matter."""
        shapes = {name: batch[name] for name in self._model_inputs}
        zeros = {name: (x.shape, np.dtype(x.dtype)) for name, x in shapes.items()}

        # Jitted here, too, so that an eager caller pays for parameters and not for a forward pass.
        @jax.jit
        def variables(key):
            inputs = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in zeros.items()}
            return self.model.init(key, **inputs)

        made = variables(key)
        # What layers sow for capture is made anew by each forward pass; it is no state.
        if extra := set(made) - {"params", "attention", "intermediates"}:
            raise NotImplementedError(
                f"{type(self.model).__name__} keeps state in {sorted(extra)}; "
                "the trainer carries parameters only"
            )
        return made["params"]

    def _apply(self, params, batch, **options):
        inputs = {name: batch[name] for name in self._model_inputs}
        return self.model.apply({"params": params}, **inputs, **options)
