# SPDX-License-Identifier: Apache-2.0
"""Mean squared errors of predictors on fresh prompts, by the number of examples."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from attnjax.analysis.icl_linear_regression.predictors import Predictor
from attnjax.data.regression import Law, Prompts

CHUNK = 5_000
"""Prompts drawn at once."""


def draw(law: Law, count: int, seed: int) -> Iterator[Prompts]:
    """Yield `count` prompts in chunks; they depend on law, length and seed alone."""
    for part, start in enumerate(range(0, count, CHUNK)):
        rng = np.random.default_rng((seed, law.length, part))
        yield law.draw(rng, min(CHUNK, count - start))


def risks(
    predictors: Mapping[str, Predictor],
    law: Law,
    lengths: Sequence[int],
    *,
    count: int = 50_000,
    seed: int = 0,
) -> dict[str, dict[int, tuple[float, float]]]:
    """Estimate errors against noisy answers; all predictors see the same prompts.

    Args:
      predictors: by name.
      law: of one task; its length is replaced.
      lengths: numbers of examples.
      count: prompts per length.
      seed: of the prompts.

    Returns:
      Name -> length -> (mean squared error, its standard error).

    Raises:
      ValueError: the law has two tasks, or a number is out of range.
    """
    if law.outputs != 1:
        raise ValueError(f"{law}: predictors answer one task")
    if count < 2 or not lengths or min(lengths) < 1:
        raise ValueError(f"count={count}, lengths={list(lengths)}: need 2 prompts and 1 example")
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in predictors}
    jitted = {name: jax.jit(predictor) for name, predictor in predictors.items()}
    for length in lengths:
        errors: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
        for prompts in draw(dataclasses.replace(law, length=length), count, seed):
            for name, predictor in jitted.items():
                guess = predictor(prompts.x, prompts.y[..., 0], prompts.x_query)
                error = np.asarray(guess, np.float64) - prompts.target[:, 0]
                errors[name].append(np.square(error))
        for name, parts in errors.items():
            squares = np.concatenate(parts)
            spread = squares.std(ddof=1) / np.sqrt(len(squares))
            found[name][length] = (float(squares.mean()), float(spread))
    return found
