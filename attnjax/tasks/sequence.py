# SPDX-License-Identifier: Apache-2.0
"""Answers at every position: regression, and prediction of the next token."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnjax.errors import RecipeError
from attnjax.metrics import Mean, Metric
from attnjax.tasks.model_task import ModelTask
from attnjax.typing import Array, Batch, Params, PRNGKey


class PositionRegression(ModelTask):
    """Mean squared error at every position that counts.

    The batch holds the model's inputs, `target [b,t,c]` float32, `scored [b,t]` bool and, in
    evaluation, `valid [b]` bool.
    """

    targets = ("target", "scored")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        t, c = self.model.length, self.model.num_classes
        return {
            **self.model.example(batch),
            "target": jax.ShapeDtypeStruct((batch, t, c), jnp.float32),
            "scored": jax.ShapeDtypeStruct((batch, t), jnp.bool_),
        }

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, or targets of another shape than the answers.

        Raises:
          RecipeError: names the entry and both shapes.
        """
        self.check_names(batch)
        rows = len(batch["target"])
        for name, expected in self.example(rows).items():
            if np.shape(batch[name]) != expected.shape:
                raise RecipeError(
                    f"{name} has shape {np.shape(batch[name])}, the model and task read "
                    f"{expected.shape}"
                )
        if not np.asarray(batch["scored"]).any():
            raise RecipeError("scored is False everywhere: nothing counts")

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean squared error over scored positions, and it again by name."""
        del step
        answers = self._apply(params, batch, train=True, rngs={"dropout": key}).logits
        weight_bt = batch["scored"].astype(jnp.float32)
        errors_bt = _squared(answers, batch["target"])
        loss = jnp.sum(errors_bt * weight_bt) / jnp.maximum(jnp.sum(weight_bt), 1)
        return loss, {"squared_error": loss}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `squared_error` and `variance`, the mean of the squared targets."""
        counts_bt = _counted(batch, batch["scored"])
        errors_bt = _squared(self._apply(params, batch).logits, batch["target"])
        squares_bt = _squared(jnp.zeros_like(batch["target"]), batch["target"])
        return {
            "squared_error": Mean.of(errors_bt, valid=counts_bt),
            "variance": Mean.of(squares_bt, valid=counts_bt),
        }

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `prediction [b,t,c]` float32."""
        return {"prediction": self._apply(params, batch).logits.astype(jnp.float32)}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,t,c]` and the model's attention `maps`."""
        output, captured = self._apply(params, batch, mutable=["attention"])
        return {"prediction": output.logits, "maps": self.model.attention_maps(captured)}


class NextToken(ModelTask):
    """Every position predicts the token after it; the model must be causal.

    The batch holds `tokens [b,t]` int32 and, in evaluation, `valid [b]` bool. Padding (0) is not
    scored.
    """

    def __init__(self, model: Any):
        """Bind a causal model that answers at every position with logits over its vocabulary.

        Raises:
          RecipeError: it is not causal, or answers otherwise.
        """
        super().__init__(model)
        if self._model_inputs != ("tokens",) or model.pool != "none":
            raise RecipeError(
                f"task next_token needs a model of tokens with pool='none', not pool={model.pool!r}"
            )
        if model.num_classes != model.vocab:
            raise RecipeError(
                f"task next_token: num_classes={model.num_classes} must equal vocab={model.vocab}"
            )
        if not model.build_mixer().is_causal:
            raise RecipeError(f"task next_token: mixer {model.mixer!r} sees the future")

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        return self.model.example(batch)

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch without tokens, or with tokens outside the vocabulary.

        Raises:
          RecipeError: names the token and its row.
        """
        self.check_names(batch)
        tokens = np.asarray(batch["tokens"])
        wrong = (tokens < 0) | (tokens >= self.model.vocab)
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            raise RecipeError(
                f"token {tokens[row, place]} at position {place} of row {row} is outside 0 to "
                f"{self.model.vocab - 1}"
            )

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean cross entropy in nats, and `bits` per token."""
        del step
        logits = self._apply(params, batch, train=True, rngs={"dropout": key}).logits
        nats_bt, counts_bt = _surprise(logits, batch["tokens"])
        loss = jnp.sum(nats_bt * counts_bt) / jnp.maximum(jnp.sum(counts_bt), 1)
        return loss, {"bits": loss / math.log(2)}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `bits` per token (per byte, if tokens are bytes) and `accuracy`."""
        logits = self._apply(params, batch).logits.astype(jnp.float32)
        nats_bt, counts_bt = _surprise(logits, batch["tokens"])
        counts_bt = _counted(batch, counts_bt)
        hits_bt = jnp.argmax(logits[:, :-1], axis=-1) == batch["tokens"][:, 1:]
        return {
            "bits": Mean.of(nats_bt / math.log(2), valid=counts_bt),
            "accuracy": Mean.of(hits_bt, valid=counts_bt),
        }

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return `logits [b,t,v]` float32 and the `prediction [b,t]` of each next token."""
        logits = self._apply(params, batch).logits.astype(jnp.float32)
        return {"logits": logits, "prediction": jnp.argmax(logits, axis=-1).astype(jnp.int32)}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,t]` and the model's attention `maps`."""
        output, captured = self._apply(params, batch, mutable=["attention"])
        prediction = jnp.argmax(output.logits, axis=-1).astype(jnp.int32)
        return {"prediction": prediction, "maps": self.model.attention_maps(captured)}


def _squared(answers_btc, target_btc):
    return jnp.mean(jnp.square(answers_btc.astype(jnp.float32) - target_btc), axis=-1)


def _surprise(logits_btv, tokens_bt):
    """Return nats of tokens 1..t-1 given those before, and which of them count, `[b,t-1]`."""
    nats_bt = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits_btv[:, :-1].astype(jnp.float32), tokens_bt[:, 1:]
    )
    return nats_bt, tokens_bt[:, 1:] != 0


def _counted(batch, counts_bt):
    if "valid" not in batch:
        return counts_bt
    return counts_bt & batch["valid"][:, None]
