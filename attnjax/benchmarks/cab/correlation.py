# SPDX-License-Identifier: Apache-2.0
"""How methods rank across patterns, tasks and lengths.

Zhang et al., arXiv 2210.07661, Section 5: indices of two patterns (or tasks) correlate over the
methods that both share; attention is worth what the index loses without it; a language model is
tried at lengths other than the one it was trained at.
"""

import math
from collections.abc import Mapping

import numpy as np

Scores = Mapping[str, Mapping[str, float]]
"""Pattern or task -> method -> index."""


def pearson(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, int]:
    """Return the correlation of two sets of scores over the methods that both have.

    Args:
      first, second: method -> score.

    Returns:
      Pearson's coefficient, NaN with fewer than two methods or without spread, and their number.
    """
    shared = [
        name
        for name in first
        if name in second and math.isfinite(first[name]) and math.isfinite(second[name])
    ]
    x, y = (np.array([scores[name] for name in shared]) for scores in (first, second))
    if len(shared) < 2 or not x.std() or not y.std():
        return math.nan, len(shared)
    return float(np.corrcoef(x, y)[0, 1]), len(shared)


def correlations(scores: Scores) -> dict[tuple[str, str], tuple[float, int]]:
    """Return `pearson` of every two patterns or tasks, each with itself among them."""
    return {(a, b): pearson(scores[a], scores[b]) for a in scores for b in scores}


def benefits(with_attention: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
    """Return what attention is worth, task by task: the index with it less that without.

    Args:
      with_attention: task -> index of a method.
      without: task -> index of the same network whose attention returns nothing.
    """
    return {
        task: with_attention[task] - without[task] for task in with_attention if task in without
    }


def extrapolation(scores: Mapping[int, float], trained: int) -> dict[int, float]:
    """Return scores at other lengths relative to that at the length of training.

    Args:
      scores: length -> score, such as a perplexity.
      trained: length of training; one of them.

    Returns:
      Length -> quotient, shorter lengths (interpolation) first.

    Raises:
      ValueError: there is no score at the length of training.
    """
    if trained not in scores:
        raise ValueError(f"no score at the length of training {trained}; there are {list(scores)}")
    return {length: scores[length] / scores[trained] for length in sorted(scores)}
