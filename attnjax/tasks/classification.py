# SPDX-License-Identifier: Apache-2.0
"""Single-label classification: soft-target cross entropy, mixing, accuracy and confusion."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.losses import cross_entropy, soft_targets
from attnjax.metrics import Accuracy, ConfusionMatrix, Mean, Metric, TopK
from attnjax.tasks.mixing import mix
from attnjax.tasks.model_task import ModelTask, check_labels
from attnjax.typing import Array, Batch, Params, PRNGKey

CONFUSION_CLASSES = 100
"""Up to this many classes the confusion matrix is kept; beyond, nobody reads it."""


class Classification(ModelTask):
    """Classification of `label` from the arrays that the model names.

    The batch holds the model's inputs, `label [b]` int32 and, in evaluation, `valid [b]` bool.
    Mixing needs one of the inputs to be called `image`.
    """

    targets = ("label",)

    def __init__(
        self,
        model: Any,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        switch_probability: float = 0.5,
        top_k: int = 5,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module whose call returns an output with `.logits [b, v]`.
          label_smoothing: mass spread evenly over all classes, in `[0, 1)`.
          mixup: Beta parameter of mixup; 0 switches it off.
          cutmix: Beta parameter of CutMix; 0 switches it off.
          mix_probability: chance that a batch is mixed.
          switch_probability: chance of CutMix where both are on.
          top_k: the second accuracy counts the label among this many guesses; it is left out where
            it would say nothing (top_k of 1, or not fewer than the classes).

        Raises:
          RecipeError: a value is out of range, or mixing is asked of a model without images.
        """
        for name, value, fine in (
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1),
            ("mixup", mixup, mixup >= 0),
            ("cutmix", cutmix, cutmix >= 0),
            ("mix_probability", mix_probability, 0 <= mix_probability <= 1),
            ("switch_probability", switch_probability, 0 <= switch_probability <= 1),
            ("top_k", top_k, top_k >= 1),
        ):
            if not fine:
                raise RecipeError(f"task.{name}={value!r} is out of range")
        super().__init__(model)
        self.label_smoothing = label_smoothing
        self.mixing = {
            "mixup": mixup,
            "cutmix": cutmix,
            "probability": mix_probability,
            "switch_probability": switch_probability,
        }
        self.top_k = top_k
        self._is_mixing = (mixup > 0 or cutmix > 0) and mix_probability > 0
        if self._is_mixing and "image" not in self._model_inputs:
            raise RecipeError(
                f"task.mixup and task.cutmix need an input called 'image'; "
                f"{type(model).__name__} reads {', '.join(self._model_inputs)}"
            )

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        label = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return {**self.model.example(batch), "label": label}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries or labels outside the model's classes.

        Raises:
          RecipeError: names the entry, or the label and its example.
        """
        self.check_names(batch)
        counts = np.asarray(batch["valid"]) if "valid" in batch else True
        check_labels(batch, int(self.model.num_classes), counts)

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean cross entropy against smoothed, mixed targets.

        Args:
          params: what `init` returned.
          batch: the global batch.
          key: this step's own key.
          step: unused; part of the contract.

        Returns:
          Scalar float32 loss (NaN if a label is out of range), the model's own `penalty` included,
          and `accuracy` against the labels as they are: in mixed batches a lower bound of what the
          model knows; and what the model measures of itself.
        """
        del step
        mix_key, dropout_key = jax.random.split(key)
        labels = batch["label"]
        targets = soft_targets(
            labels, int(self.model.num_classes), label_smoothing=self.label_smoothing
        )
        if self._is_mixing:
            images, targets = mix(mix_key, batch["image"], targets, **self.mixing)
            batch = {**batch, "image": images}
        output = self._apply(params, batch, train=True, rngs={"dropout": dropout_key})
        loss = jnp.mean(cross_entropy(output.logits, targets))
        hits = jnp.argmax(output.logits, axis=-1) == labels
        own = {name: x for name, x in getattr(output, "aux", {}).items() if x.ndim == 0}
        loss = loss + own.pop("penalty", 0.0)
        return loss, {"accuracy": jnp.mean(hits.astype(jnp.float32)), **own}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `accuracy`, `loss`, and where they apply `top<k>` and `confusion`.

        The loss is the plain cross entropy, without smoothing or mixing.
        """
        logits = self._apply(params, batch).logits.astype(jnp.float32)
        labels, classes = batch["label"], logits.shape[-1]
        valid = batch["valid"] if "valid" in batch else jnp.ones(labels.shape, bool)
        losses = cross_entropy(logits, soft_targets(labels, classes))
        states: dict[str, Metric] = {
            "accuracy": Accuracy.from_logits(logits, labels, valid=valid),
            "loss": Mean.of(losses, valid=valid),
        }
        if 1 < self.top_k < classes:
            states[f"top{self.top_k}"] = TopK.from_logits(logits, labels, self.top_k, valid=valid)
        if classes <= CONFUSION_CLASSES:
            guesses = jnp.argmax(logits, axis=-1)
            states["confusion"] = ConfusionMatrix.of(labels, guesses, classes, valid=valid)
        return states

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `logits [b, v]`, `probabilities [b, v]` (float32) and `prediction [b]` int32."""
        logits = self._apply(params, batch).logits.astype(jnp.float32)
        return {
            "logits": logits,
            "probabilities": jax.nn.softmax(logits, axis=-1),
            "prediction": jnp.argmax(logits, axis=-1).astype(jnp.int32),
        }

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return the attention maps behind the predictions, for pictures.

        Returns:
          `prediction [b]`; `label` and `image` where the batch has them; `maps`, the model's
          attention maps by title, each `[b, y, x]` float32.
        """
        output, captured = self._apply(params, batch, mutable=["attention"])
        shown = {name: batch[name] for name in ("image", "label") if name in batch}
        return {
            **shown,
            "prediction": jnp.argmax(output.logits, axis=-1).astype(jnp.int32),
            "maps": self.model.attention_maps(captured),
        }
