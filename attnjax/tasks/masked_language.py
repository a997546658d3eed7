# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling: guess the tokens of a text that are hidden."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.losses.language import TokenLosses, token_losses
from attnjax.metrics import Mean, Metric
from attnjax.metrics.language import Perplexity
from attnjax.parallel.constrain import constrain, gather
from attnjax.tasks.language import check_vocabulary, training_keys
from attnjax.tasks.model_task import ModelTask
from attnjax.typing import Array, Batch, Params, PRNGKey


class MaskedLanguageModelling(ModelTask):
    """Guess hidden tokens: the batch holds `tokens`, `target` int32 and `scored` bool, `[b,t]`.

    `tokens` is the text with some tokens replaced, `target` the text, `scored` says which are to be
    guessed; `data.masking` makes them. Logits exist for a part of the tokens at a time only.
    """

    targets = ("target", "scored")

    def __init__(self, model: Any, *, logits_chunk: int = 0):
        """Bind a model to the task.

        Args:
          model: Linen module with `features(tokens, train=)`, `head_kernel(params)`,
            `head_bias(params)` and `vocab_size`, such as `models.encoder.Encoder` with a head.
          logits_chunk: tokens of an example whose logits exist at the same time; 0: all.

        Raises:
          RecipeError: the value is out of range, or the model has no head for hidden tokens.
        """
        if logits_chunk < 0:
            raise RecipeError(f"task.logits_chunk={logits_chunk} is out of range")
        if not hasattr(model, "features") or getattr(model, "head", "masked") != "masked":
            raise RecipeError(
                f"task masked_language: {type(model).__name__} has no head for hidden tokens"
            )
        super().__init__(model)
        self.logits_chunk = logits_chunk

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        tokens = self.model.example(batch)["tokens"]
        scored = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
        return {"tokens": tokens, "target": tokens, "scored": scored}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, foreign tokens, or nothing to guess.

        Raises:
          RecipeError: names the entry, or the token and its example.
        """
        self.check_names(batch)
        for name in ("tokens", "target"):
            check_vocabulary(batch, name, self.model.vocab_size)
        if np.asarray(batch["scored"]).dtype != bool or not np.any(batch["scored"]):
            raise RecipeError("scored must be boolean and True somewhere: nothing is to be guessed")

    def _compare(self, params, batch, **options) -> tuple[TokenLosses, Array]:
        """Return losses of all tokens, and which of them count, `[b,t]`."""
        features_btd = self.model.apply(
            {"params": params}, batch["tokens"], method="features", **options
        )
        losses = token_losses(
            features_btd,
            gather(self.model.head_kernel(params), None, "vocab"),
            batch["target"],
            bias=self.model.head_bias(params),
            chunk=self.logits_chunk,
            place=constrain,
        )
        counts = batch["scored"]
        return losses, counts & batch["valid"][:, None] if "valid" in batch else counts

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean over all hidden tokens in nats, and its `perplexity` and `accuracy`."""
        del step
        losses, counts = self._compare(params, batch, train=True, rngs=training_keys(key))
        total = jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)
        mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / total
        loss = mean(losses.nll)
        hits = (losses.best == batch["target"]).astype(jnp.float32)
        return loss, {"accuracy": mean(hits), "perplexity": jnp.exp(loss)}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `loss` (nats per hidden token), `perplexity` and `accuracy`."""
        losses, counts = self._compare(params, batch)
        return {
            "loss": Mean.of(losses.nll, valid=counts),
            "perplexity": Perplexity.of(losses.nll, valid=counts),
            "accuracy": Mean.of(losses.best == batch["target"], valid=counts),
        }

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `prediction [b,t]` int32: the text with hidden tokens filled in."""
        losses, _ = self._compare(params, batch)
        return {"prediction": jnp.where(batch["scored"], losses.best, batch["tokens"])}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,t]` int32 and the model's attention `maps`."""
        output, captured = self._apply(params, batch, mutable=["attention"])
        best = jnp.argmax(output.logits, axis=-1).astype(jnp.int32)
        return {
            "prediction": jnp.where(batch["scored"], best, batch["tokens"]),
            "maps": self.model.attention_maps(captured),
        }
