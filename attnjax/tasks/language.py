# SPDX-License-Identifier: Apache-2.0
"""Language modelling: predict every next token of a text, whatever its length."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.errors import RecipeError
from attnjax.losses.language import TokenLosses, token_losses
from attnjax.metrics import Mean, Metric
from attnjax.metrics.language import BitsPerByte, Perplexity
from attnjax.nn.pattern_attention import RANDOM
from attnjax.parallel.constrain import constrain, gather
from attnjax.tasks.model_task import ModelTask, row_name
from attnjax.typing import Array, Batch, Params, PRNGKey

INIT_LENGTH = 8
"""Tokens of the example that parameters are made with: their shapes do not depend on it."""


def training_keys(key: PRNGKey) -> dict[str, PRNGKey]:
    """Return the random streams of a model that is being trained: dropout and attention."""
    dropout_key, attention_key = jax.random.split(key)
    return {"dropout": dropout_key, RANDOM: attention_key}


def integers(batch: Mapping[str, Any], name: str) -> np.ndarray:
    """Return a batch entry, or raise RecipeError if it is no integers `[b, t]`."""
    array = np.asarray(batch[name])
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise RecipeError(
            f"{name} must be [b, t] integers, not {array.dtype} of shape {array.shape}"
        )
    return array


def check_vocabulary(batch: Mapping[str, Any], name: str, size: int) -> None:
    """Refuse a host batch with tokens outside the vocabulary.

    Raises:
      RecipeError: names the first such token, its place and its example.
    """
    tokens = integers(batch, name)
    wrong = (tokens < 0) | (tokens >= size)
    if wrong.any():
        row, place = (int(i[0]) for i in np.nonzero(wrong))
        where = row_name(batch, row)
        which = "token" if name == "tokens" else f"{name} token"
        raise RecipeError(
            f"{which} {int(tokens[row, place])} at place {place} of {where} is outside 0 to "
            f"{size - 1}: model.vocab_size={size} does not fit this data"
        )


class LanguageModelling(ModelTask):
    """Next-token prediction on `tokens [b,t]` int32.

    With `packed`, the batch also holds `segments [b,t]` int32: documents that do not see each other
    and are not predicted from each other; 0 is padding. With `scored`, it holds `scored [b,t]`
    bool, which tokens are to be predicted. Logits exist for a part of the tokens at a time only.
    Evaluation texts may have another length than those of training.
    """

    free_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {
        name: (1,) for name in ("tokens", "segments", "scored")
    }

    def __init__(
        self,
        model: Any,
        *,
        z_loss: float = 0.0,
        logits_chunk: int = 0,
        packed: bool = False,
        scored: bool = False,
        bytes_per_token: float = 1.0,
        tokens_per_word: float = 0.0,
    ):
        """Bind a model to the task.

        Args:
          model: Linen module with `encode(tokens, segments, train=)`, `head_kernel(params)`,
            `is_causal` and `vocab_size`, such as `models.decoder.Decoder` or `models.gpt2.GPT2`.
          z_loss: weight of the mean squared log-sum-exp of the logits.
          logits_chunk: tokens of an example whose logits exist at the same time; 0: all.
          packed: the batch holds `segments`.
          scored: the batch holds `scored`.
          bytes_per_token: mean length of a token, for bits per byte.
          tokens_per_word: mean tokens of a word, for the perplexity of words, as lm-eval has it of
            WikiText; 0: it is left out.

        Raises:
          RecipeError: a value is out of range, or the model sees what it should predict.
        """
        for name, value, fine in (
            ("z_loss", z_loss, z_loss >= 0),
            ("logits_chunk", logits_chunk, logits_chunk >= 0),
            ("bytes_per_token", bytes_per_token, bytes_per_token > 0),
            ("tokens_per_word", tokens_per_word, tokens_per_word >= 0),
        ):
            if not fine:
                raise RecipeError(f"task.{name}={value!r} is out of range")
        for name in ("encode", "head_kernel"):
            if not hasattr(model, name):
                raise RecipeError(
                    f"task language: {type(model).__name__} is no language model: it has no {name}"
                )
        if not model.is_causal:
            raise RecipeError(
                f"task language: with model.attention={model.attention!r} tokens see what they "
                "should predict; choose 'causal'"
            )
        super().__init__(model)
        self.z_loss, self.logits_chunk = z_loss, logits_chunk
        self.packed, self.scored, self.bytes_per_token = packed, scored, bytes_per_token
        self.tokens_per_word = tokens_per_word

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch entries that `loss` reads."""
        return ("tokens", *(("segments",) * self.packed), *(("scored",) * self.scored))

    def example(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of what `loss` reads, for a batch of this size."""
        tokens = self.model.example(batch)["tokens"]
        scored = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
        return {name: scored if name == "scored" else tokens for name in self.inputs}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuse a host batch with missing entries or tokens outside the vocabulary.

        Raises:
          RecipeError: names the entry, or the token and its example.
        """
        self.check_names(batch)
        arrays = {name: integers(batch, name) for name in self.inputs if name != "scored"}
        if self.scored:
            scored = np.asarray(batch["scored"])
            if scored.dtype != bool or scored.shape != arrays["tokens"].shape or not scored.any():
                raise RecipeError(
                    f"scored must be boolean {arrays['tokens'].shape} and True somewhere, got "
                    f"{scored.dtype} {scored.shape}"
                )
        if self.packed and (arrays["segments"] < 0).any():
            raise RecipeError("segments must be at least 0, which is padding")
        check_vocabulary(batch, "tokens", self.model.vocab_size)

    def init(self, key: PRNGKey, batch: Mapping[str, Any]) -> Params:
        """Return new parameters; nothing of the batch matters."""
        del batch
        tokens = jnp.zeros((1, min(INIT_LENGTH, self.model.length)), jnp.int32)
        return jax.jit(self.model.init)(key, tokens)["params"]

    def _compare(self, params, batch, **options) -> tuple[TokenLosses, Array, dict[str, Array]]:
        """Return losses of all tokens, which of them count `[b,t]`, and the model's own values."""
        tokens, segments = batch["tokens"], batch.get("segments") if self.packed else None
        hidden, aux = self._hidden(params, tokens, segments, **options)
        last = tokens.shape[1] - 1
        counts = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < last, tokens.shape)
        if segments is not None:
            counts &= (segments > 0) & (segments == jnp.roll(segments, -1, axis=1))
        if self.scored:
            counts &= jnp.roll(batch["scored"], -1, axis=1)
        if "valid" in batch:
            counts &= batch["valid"][:, None]
        losses = token_losses(
            hidden,
            gather(self.model.head_kernel(params), None, "vocab"),
            jnp.roll(tokens, -1, axis=1),
            chunk=self.logits_chunk,
            place=constrain,
        )
        return losses, counts, aux

    def _hidden(self, params, tokens, segments, **options):
        """Return what the head reads `[b, t, d]`, and the model's own values."""
        return self.model.apply({"params": params}, tokens, segments, method="encode", **options)

    def loss(
        self, params: Params, batch: Batch, key: PRNGKey, step: Array | int
    ) -> tuple[Array, dict[str, Array]]:
        """Return the mean negative log-likelihood of next tokens, plus penalties.

        Args:
          params: what `init` returned.
          batch: the global batch.
          key: of dropout, and of attentions that draw.
          step: unused; part of the contract.

        Returns:
          Scalar float32 loss: the mean in nats over all tokens that count, `z_loss` times the mean
          squared log-sum-exp, and the model's own penalty; and of the first alone `perplexity` and
          `bits_per_byte`, with `accuracy` and what a mixture of experts measures.
        """
        del step
        losses, counts, aux = self._compare(params, batch, train=True, rngs=training_keys(key))
        total = jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)
        mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / total
        nll = mean(losses.nll)
        loss = nll + aux.get("penalty", 0.0)
        if self.z_loss:
            loss = loss + self.z_loss * mean(jnp.square(losses.lse))
        hits = losses.best == jnp.roll(batch["tokens"], -1, axis=1)
        metrics = {
            "accuracy": mean(hits.astype(jnp.float32)),
            "perplexity": jnp.exp(nll),
            "bits_per_byte": nll / (self.bytes_per_token * math.log(2)),
        }
        return loss, metrics | {name: x for name, x in aux.items() if name != "penalty"}

    def evaluate(self, params: Params, batch: Batch) -> dict[str, Metric]:
        """Return states of `loss` (nats per token), `perplexity`, `bits_per_byte`, `accuracy`.

        And of `word_perplexity`, exp(loss x tokens_per_word), if that number is given.
        """
        losses, counts, _ = self._compare(params, batch)
        return self._states(losses, counts, batch)

    def _states(self, losses, counts, batch):
        hits = losses.best == jnp.roll(batch["tokens"], -1, axis=1)
        states = {
            "loss": Mean.of(losses.nll, valid=counts),
            "perplexity": Perplexity.of(losses.nll, valid=counts),
            "bits_per_byte": BitsPerByte.from_losses(losses.nll, counts, self.bytes_per_token),
            "accuracy": Mean.of(hits, valid=counts),
        }
        if self.tokens_per_word:
            of_words = self.tokens_per_word * losses.nll
            states["word_perplexity"] = Perplexity.of(of_words, valid=counts)
        return states

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Return what is thought of every next token.

        Returns:
          `prediction [b,t]` int32, the likeliest next tokens; `log_likelihood [b]` float32 of the
          text, in nats.
        """
        losses, counts, _ = self._compare(params, batch)
        total = -jnp.sum(jnp.where(counts, losses.nll, 0), axis=1)
        return {"prediction": losses.best, "log_likelihood": total}

    def explain(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Return the likeliest token after each text and where its last token looks.

        Returns:
          `prediction [b]` int32; `maps`, title -> `[b, 1, s]` float32.
        """
        segments = batch["segments"] if self.packed else None
        output, captured = self.model.apply(
            {"params": params}, batch["tokens"], segments, mutable=["attention"]
        )
        return {
            "prediction": jnp.argmax(output.logits[:, -1], axis=-1).astype(jnp.int32),
            "maps": self.model.attention_maps(captured),
        }
