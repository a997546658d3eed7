# SPDX-License-Identifier: Apache-2.0
"""Texts that a trained model writes for a held-out set, and how they compare with the true ones."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from attnjax.data.iterator import eval_batches
from attnjax.data.tokenizers import Tokenizer, make_tokenizer
from attnjax.errors import RecipeError
from attnjax.metrics.rouge import rouge
from attnjax.recipe import Evaluation
from attnjax.train.program import Program
from attnjax.typing import Params


def write_texts(
    program: Program, params: Params, evaluation: Evaluation, *, limit: int = 0
) -> tuple[list[str], list[str]]:
    """Write a text for every source of a set, in one process.

    Args:
      program: of a recipe with the task `sequence_to_sequence`; call under `jax.set_mesh`.
      params: sharded as the program's.
      evaluation: the set and its batch size (0: the training batch).
      limit: stop after so many; 0: all.

    Returns:
      What was written and what should have been, in the order of the set.

    Raises:
      RecipeError: several processes would each see a part of the set, or the source has no texts.
    """
    if jax.process_count() > 1:
        raise RecipeError(f"{jax.process_count()} processes: texts are written by one")
    tokenizer = _tokenizer(evaluation)
    predict = jax.jit(program.task.predict)
    written: list[str] = []
    references: list[str] = []
    for rows in eval_batches(evaluation.data, evaluation.batch or program.recipe.batch):
        found = np.asarray(predict(params, program.to_device(rows))["prediction"])
        written += [tokenizer.decode(row) for row in found[rows["valid"]]]
        references += [tokenizer.decode(row) for row in rows["target"][rows["valid"]]]
        if limit and len(written) >= limit:
            break
    return written[: limit or None], references[: limit or None]


def score_summaries(
    program: Program,
    params: Params,
    evaluation: Evaluation,
    *,
    limit: int = 0,
    score: Callable[[Sequence[str], Sequence[str]], dict[str, float]] = rouge,
) -> dict[str, float]:
    """Return ROUGE of what a model writes for a set; arguments as in `write_texts`.

    Args:
      program, params, evaluation, limit: see there.
      score: compares what was written with what should have been.
    """
    return score(*write_texts(program, params, evaluation, limit=limit))


def _tokenizer(evaluation: Evaluation) -> Tokenizer:
    source = evaluation.data.source
    if source.get("name") not in ("multi_news", "text_pairs"):
        raise RecipeError(f"source {source.get('name')!r} has no texts to compare")
    return make_tokenizer(source.get("tokenizer", "bytes"))
