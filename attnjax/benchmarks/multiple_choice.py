# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: which continuation of a context a language model thinks likeliest.

Files are lines of JSON with `context`, `choices` and `gold`, the number of the right choice. What
is scored are the continuations' log-likelihoods, as they are or per byte; the latter is the
length-normalised accuracy of the Language Model Evaluation Harness.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from attnjax.errors import RecipeError

Likelihood = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""Pairs of context and continuation -> log-likelihood of each continuation, in nats."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One question.

    Attributes:
      context: text in front of the choices.
      choices: at least two continuations, spaces included.
      gold: number of the right one.
    """

    context: str
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self):
        if len(self.choices) < 2 or not all(self.choices):
            raise ValueError(f"choices={self.choices!r}: must be at least two texts, none empty")
        if not 0 <= self.gold < len(self.choices):
            raise ValueError(f"gold={self.gold}: must be from 0 to {len(self.choices) - 1}")


@dataclasses.dataclass(frozen=True)
class Scores:
    """How many questions were answered right.

    Attributes:
      accuracy: share of right answers.
      error: its standard error.
      chance: accuracy of guessing.
      count: questions.
    """

    accuracy: float
    error: float
    chance: float
    count: int


def load(path: str | pathlib.Path) -> list[Record]:
    """Read questions.

    Raises:
      RecipeError: there is no such file, no question in it, or a line is none; file and line are
        named.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise RecipeError(f"no file {path}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            context, choices, gold = given["context"], given["choices"], given["gold"]
            texts = [context, *choices]
            if not all(isinstance(text, str) for text in texts) or isinstance(choices, str):
                raise ValueError("context and choices must be texts")
            if not isinstance(gold, int) or isinstance(gold, bool):
                raise ValueError(f"gold={gold!r} must be a number")
            records.append(Record(context, tuple(choices), gold))
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path}:{number}: no question: {error!r}") from error
    if not records:
        raise RecipeError(f"{path}: no question")
    return records


def generate(seed: int, count: int, choices: int = 4) -> list[Record]:
    """Make questions whose answer stands in the context: which letter followed a letter before.

    Args:
      seed: of the letters.
      count: questions.
      choices: from 2 to 26.
    """
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        letters = [chr(97 + i) for i in rng.permutation(26)]
        keys, values = letters[:choices], [str(i) for i in rng.permutation(choices)]
        told = " ".join(key + value for key, value in zip(keys, values, strict=True))
        asked = int(rng.integers(choices))
        records.append(
            Record(f"{told} {keys[asked]}", tuple(map(str, range(choices))), int(values[asked]))
        )
    return records


def predict(
    records: Sequence[Record], likelihood: Likelihood, *, per_byte: bool = False
) -> list[int]:
    """Return the likeliest choice of every question, the first of equals.

    Args:
      records: questions.
      likelihood: the model.
      per_byte: compare log-likelihoods divided by the bytes of the choices.
    """
    pairs = [(record.context, choice) for record in records for choice in record.choices]
    values, at, found = list(likelihood(pairs)), 0, []
    if len(values) != len(pairs):
        raise ValueError(f"{len(values)} log-likelihoods for {len(pairs)} continuations")
    for record in records:
        own = np.asarray(values[at : at + len(record.choices)], np.float64)
        at += len(record.choices)
        if per_byte:
            own = own / [len(choice.encode()) for choice in record.choices]
        found.append(int(np.argmax(own)))
    return found


def score(predictions: Sequence[int], records: Sequence[Record]) -> Scores:
    """Count right answers.

    Raises:
      ValueError: the numbers of both differ, or are 0.
    """
    if len(predictions) != len(records) or not records:
        raise ValueError(f"{len(predictions)} predictions for {len(records)} questions")
    hits = [p == record.gold for p, record in zip(predictions, records, strict=True)]
    accuracy = sum(hits) / len(hits)
    chance = sum(1 / len(record.choices) for record in records) / len(records)
    return Scores(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(hits)), chance, len(hits))
