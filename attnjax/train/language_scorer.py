# SPDX-License-Identifier: Apache-2.0
"""What a trained language model thinks of texts, and what it writes: for evaluations on text.

`LanguageScorer` serves `benchmarks.multiple_choice` and, through `harness_model`, the Language
Model Evaluation Harness (package lm-eval, versions 0.4).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.benchmarks import multiple_choice
from attnjax.data.tokenizers import (
    BEGIN,
    BYTES,
    END,
    PADDING,
    RESERVED,
    Tokenizer,
    make_tokenizer,
)
from attnjax.errors import RecipeError
from attnjax.losses.language import token_losses
from attnjax.nn.generation import write
from attnjax.parallel.constrain import constrain
from attnjax.recipe import Recipe
from attnjax.typing import Params


class LanguageScorer:
    """Log-likelihoods of continuations, in batches of one shape.

    Texts are cut at the left to what the model reads. The first token of a text without context is
    predicted from the token that begins a text.
    """

    def __init__(
        self, model: Any, params: Params, tokenizer: Tokenizer, *, length: int = 0, batch: int = 8
    ):
        """Bind a model.

        Args:
          model: Linen module with `encode(tokens, segments)`, `head_kernel(params)`, `vocab_size`
            and `length`, such as `models.decoder.Decoder`.
          params: its parameters.
          tokenizer: with reserved tokens, so that there is one to begin with.
          length: tokens that the model reads at once; 0: those of the model.
          batch: texts that are read at once.

        Raises:
          RecipeError: the tokenizer has other tokens than the model, or none to begin with.
        """
        reserved = getattr(tokenizer, "reserved", 0)
        if tokenizer.vocab_size > model.vocab_size or reserved <= END:
            raise RecipeError(
                f"a tokenizer of {tokenizer.vocab_size} tokens, {reserved} of them reserved, does "
                f"not fit a model of {model.vocab_size}: needed are as many, {END + 1} reserved"
            )
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.length, self.batch = length or model.length, batch
        self._compare = jax.jit(self._losses)

    def _losses(self, params, tokens_bt, segments_bt):
        hidden_btd, _ = self.model.apply(
            {"params": params}, tokens_bt, segments_bt, method="encode"
        )
        losses = token_losses(
            hidden_btd, self.model.head_kernel(params), jnp.roll(tokens_bt, -1, axis=1),
            place=constrain,
        )  # fmt: skip
        return losses.nll, losses.best == jnp.roll(tokens_bt, -1, axis=1)

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return for every (context, continuation) the log-likelihood of the latter, in nats.

        Returns:
          Pairs of log-likelihood and whether every token of the continuation is the likeliest one.
        """
        rows = []
        for context, continuation in pairs:
            own = self.tokenizer.encode(continuation.encode())
            before = [BEGIN, *self.tokenizer.encode(context.encode())]
            text = np.concatenate([before, own]).astype(np.int32)[-self.length :]
            rows.append((text, min(len(own), len(text) - 1)))
        found: list[tuple[float, bool]] = []
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            tokens = np.full((self.batch, self.length), PADDING, np.int32)
            segments = np.zeros_like(tokens)
            for row, (text, _) in enumerate(part):
                tokens[row, : len(text)] = text
                segments[row, : len(text)] = 1
            nll, is_best = jax.device_get(self._compare(self.params, tokens, segments))
            for row, (text, count) in enumerate(part):
                place = slice(len(text) - 1 - count, len(text) - 1)
                found.append((-float(nll[row, place].sum()), bool(is_best[row, place].all())))
        return found

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the log-likelihoods alone, as `benchmarks.multiple_choice.Likelihood`."""
        return [value for value, _ in self.log_likelihoods(pairs)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood of whole texts, in nats, read in windows without overlap."""
        found = []
        for text in texts:
            tokens = self.tokenizer.encode(text.encode())
            step, total = self.length - 1, 0.0
            for start in range(0, len(tokens), step * self.batch):
                parts = [
                    tokens[at : at + step]
                    for at in range(start, min(len(tokens), start + step * self.batch), step)
                ]
                rows = np.full((self.batch, self.length), PADDING, np.int32)
                segments = np.zeros_like(rows)
                for row, part in enumerate(parts):
                    first = start + row * step
                    rows[row, 0] = tokens[first - 1] if first else BEGIN
                    rows[row, 1 : len(part) + 1] = part
                    segments[row, : len(part) + 1] = 1
                nll, _ = jax.device_get(self._compare(self.params, rows, segments))
                total += sum(float(nll[row, : len(part)].sum()) for row, part in enumerate(parts))
            found.append(-total)
        return found

    def write(
        self, prompts: Sequence[str], tokens: int, until: Sequence[str] = (), **options: Any
    ) -> list[str]:
        """Continue prompts, greedily by default.

        Args:
          prompts: texts; cut at the left so that prompt and continuation fit.
          tokens: most tokens to write, below `length`.
          until: texts at which a continuation ends; they are left out.
          **options: of `nn.generation.generate`, such as `temperature` and `key`.

        Raises:
          ValueError: no prompt would be left.
        """
        room = self.length - tokens
        if tokens < 1 or room < 1:
            raise ValueError(f"tokens={tokens}: must be from 1 to {self.length - 1}")
        rows, lengths = np.full((len(prompts), room), PADDING, np.int32), []
        for row, prompt in enumerate(prompts):
            text = [BEGIN, *self.tokenizer.encode(prompt.encode())][-room:]
            rows[row, : len(text)] = text
            lengths.append(len(text))
        given = np.array(lengths)
        written = jax.device_get(
            write(self.model, self.params, rows, tokens, lengths=given, end=END, **options)
        )
        found = [self.tokenizer.decode(row) for row in written]
        for stop in until:
            found = [text.partition(stop)[0] for text in found]
        return found


def of_recipe(recipe: Recipe, model: Any, params: Params) -> LanguageScorer:
    """Return the scorer of a recipe's network.

    Args:
      recipe: its data's source names the tokenizer ("bytes" if it does not) and reserves tokens.
      model, params: the network.

    Raises:
      RecipeError: the tokens do not fit.
    """
    source = recipe.data.source
    tokenizer = make_tokenizer(source.get("tokenizer", BYTES), source.get("reserved", RESERVED))
    return LanguageScorer(model, params, tokenizer)


def answer(recipe: Recipe, model: Any, params: Params, path: str) -> dict[str, float]:
    """Answer questions of multiple choice with the network of a recipe.

    Args:
      recipe, model, params: see `of_recipe`.
      path: see `benchmarks.multiple_choice`.

    Returns:
      `choices/accuracy` and `choices/accuracy_per_byte` with their standard errors, and
      `choices/chance`.

    Raises:
      RecipeError: the file is faulty, or the tokens do not fit.
    """
    records, found = multiple_choice.load(path), {}
    scorer = of_recipe(recipe, model, params)
    values = scorer([(record.context, choice) for record in records for choice in record.choices])
    for suffix, per_byte in (("", False), ("_per_byte", True)):
        predictions = multiple_choice.predict(records, lambda _: values, per_byte=per_byte)
        scores = multiple_choice.score(predictions, records)
        found[f"choices/accuracy{suffix}"] = scores.accuracy
        found[f"choices/error{suffix}"] = scores.error
    return found | {"choices/chance": scores.chance}


def harness_model(scorer: LanguageScorer) -> Any:
    """Return a model for lm-eval's `simple_evaluate(model=...)`.

    Raises:
      RecipeError: the package lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM  # type: ignore[import-not-found]
    except ImportError as error:
        raise RecipeError(
            "this needs the package lm-eval: pip install 'attnjax[lm-eval]'"
        ) from error

    class HarnessModel(LM):
        """Answers requests of the harness with a `LanguageScorer`."""

        def loglikelihood(self, requests):
            return scorer.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return scorer.rolling([request.args[0] for request in requests])

        def generate_until(self, requests):
            found = []
            for request in requests:
                prompt, options = request.args
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else until
                count = min(options.get("max_gen_toks", 128), scorer.length - 1)
                found += scorer.write([prompt], count, until)
            return found

    return HarnessModel()
