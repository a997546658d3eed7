# SPDX-License-Identifier: Apache-2.0
"""From one sequence to another: summaries, copies, translations."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.losses.language import TokenLosses, token_losses
from attnjax.metrics import Mean, Metric
from attnjax.metrics.language import Perplexity
from attnjax.nn.generation import generate
from attnjax.parallel.constrain import constrain, gather
from attnjax.tasks.language import check_vocabulary, training_keys
from attnjax.tasks.model_task import ModelTask
from attnjax.typing import Array, Batch, Params, PRNGKey

PADDING, BEGIN, END = 0, 1, 2


class SequenceToSequence(ModelTask):
    """Write `target [b,t]` having read `source [b,s]`, both int32.

    0 is padding, 2 ends a target, 1 is what the decoder reads first; a batch holds none of it.
    """

    def __init__(
        self,
        model: Any,
        *,
        label_smoothing: float = 0.0,
        logits_chunk: int = 0,
        shortest: int = 0,
        longest: int = 0,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module with `encode(source, target, train=)`, `begin`, `step`,
            `empty_streams`, `head_kernel(params)` and `vocab_size`, such as
            `models.encoder_decoder.EncoderDecoder`.
          label_smoothing: a; the loss is (1 - a) nll + a (mean over the vocabulary of -log p).
          logits_chunk: tokens of an example whose logits exist at the same time; 0: all.
          shortest: `predict` does not end before so many tokens.
          longest: `predict` writes at most so many tokens, the end included; 0: the model's length.

        Raises:
          RecipeError: a value is out of range, or the model writes no sequences.
        """
        missing = [n for n in ("encode", "begin", "step", "head_kernel") if not hasattr(model, n)]
        if missing:
            raise RecipeError(
                f"task sequence_to_sequence: {type(model).__name__} has no {', '.join(missing)}"
            )
        super().__init__(model)
        most = model.example(1)["target"].shape[1]
        for name, value, fine in (
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1),
            ("logits_chunk", logits_chunk, logits_chunk >= 0),
            ("longest", longest, 0 <= longest <= most),
            ("shortest", shortest, 0 <= shortest <= (longest or most)),
        ):
            if not fine:
                raise RecipeError(f"task.{name}={value!r} is out of range")
        self.label_smoothing, self.logits_chunk = label_smoothing, logits_chunk
        self.shortest, self.longest = shortest, longest or most

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        return self.model.example(batch)

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries, foreign tokens, or nothing to write.

        Raises:
          RecipeError: names the entry, or the token and its example.
        """
        self.check_names(batch)
        for name in ("source", "target"):
            check_vocabulary(batch, name, self.model.vocab_size)
        if not np.any(batch["target"]):
            raise RecipeError("target is padding everywhere: nothing is to be written")

    def _compare(self, params, batch, **options) -> tuple[TokenLosses, Array]:
        """Return losses of all tokens, and which of them count, `[b,t]`."""
        target = batch["target"]
        hidden_btd, _ = self.model.apply(
            {"params": params}, batch["source"], read_before(target), method="encode", **options
        )
        losses = token_losses(
            hidden_btd,
            gather(self.model.head_kernel(params), None, "vocab"),
            target,
            chunk=self.logits_chunk,
            uniform=self.label_smoothing > 0,
            place=constrain,
        )
        counts = target != PADDING
        return losses, counts & batch["valid"][:, None] if "valid" in batch else counts

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the smoothed loss per token in nats, and `perplexity` and `accuracy` without."""
        del step
        losses, counts = self._compare(params, batch, train=True, rngs=training_keys(key))
        total = jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)
        mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / total
        hits = (losses.best == batch["target"]).astype(jnp.float32)
        return mean(losses.smoothed(self.label_smoothing)), {
            "accuracy": mean(hits),
            "perplexity": jnp.exp(mean(losses.nll)),
        }

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `loss` (nats per token), `perplexity`, `accuracy` and `exact_match`.

        `accuracy` is that of the next token after a true beginning; `exact_match` the share of
        targets that greedy decoding without limits writes word for word, which is where every next
        token is right.
        """
        losses, counts = self._compare(params, batch)
        hits = losses.best == batch["target"]
        has_target = jnp.any(counts, axis=1)
        return {
            "loss": Mean.of(losses.nll, valid=counts),
            "perplexity": Perplexity.of(losses.nll, valid=counts),
            "accuracy": Mean.of(hits, valid=counts),
            "exact_match": Mean.of(jnp.all(hits | ~counts, axis=1), valid=has_target),
        }

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Write targets greedily, a token at a time.

        Returns:
          `prediction [b, longest]` int32: up to the end, padding behind.
        """
        apply = lambda *args, method: self.model.apply({"params": params}, *args, method=method)
        b = batch["source"].shape[0]
        # Attentions may keep as many tokens as there are positions: all predictions fit.
        state = apply(batch["source"], self.model.empty_streams(b, self.longest), method="begin")
        written = generate(
            lambda tokens, state: apply(tokens, state, method="step"),
            state,
            jnp.full((b, 1), BEGIN, jnp.int32),
            self.longest,
            shortest=self.shortest,
            end=END,
            padding=PADDING,
        )
        return {"prediction": written}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return `prediction [b,t]` int32 of every next token, and the model's attention `maps`."""
        output, captured = self.model.apply(
            {"params": params}, batch["source"], read_before(batch["target"]), mutable=["attention"]
        )
        return {
            "prediction": jnp.argmax(output.logits, axis=-1).astype(jnp.int32),
            "maps": self.model.attention_maps(captured),
        }


def read_before(target: Array) -> Array:
    """Return what a decoder reads before each token of `target [b,t]`: 1, then the tokens."""
    first = jnp.full_like(target[:, :1], BEGIN)
    return jnp.concatenate([first, target[:, :-1]], axis=1)
