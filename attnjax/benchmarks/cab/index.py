# SPDX-License-Identifier: Apache-2.0
"""The compositional index: one number for a method in a pattern, from metrics of many tasks.

    z = sign (x - mu) / sigma                    for every metric
    CI = mean over tasks of (mean over the metrics of the task of z)

Zhang et al., arXiv 2210.07661, Section 4. mu and sigma are over methods: those that were published,
or those at hand (`estimate`).
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping

from attnjax.ops.efficient import PATTERNS

PAPER = {
    "title": "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
    "id": "arXiv:2210.07661",
    "year": 2023,
    "code": "https://github.com/Shark-NLP/CAB",
    "licence": "MIT (the attentions)",
    "claim": "Efficient attentions that do well in one pattern need not do so in another.",
}

Tasks = Mapping[str, tuple["Metric", ...]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric of a task.

    Attributes:
      name: unique within a pattern.
      sign: +1 where more is better, -1 where less is.
      mean, deviation: over methods.
    """

    name: str
    sign: int
    mean: float = 0.0
    deviation: float = 1.0

    def __post_init__(self):
        if self.sign not in (-1, 1):
            raise ValueError(f"metric {self.name}: sign={self.sign} must be 1 or -1")
        if not self.deviation > 0:
            raise ValueError(f"metric {self.name}: deviation={self.deviation} must be above 0")


@dataclasses.dataclass(frozen=True)
class Index:
    """The index of a method in a pattern.

    Attributes:
      tasks: task -> mean z of its metrics; tasks without results are absent.
      total: mean over these tasks; NaN if there are none.
    """

    tasks: dict[str, float]
    total: float


def score(values: Mapping[str, float], tasks: Tasks) -> Index:
    """Return the compositional index of one method.

    Args:
      values: metric -> value. A task one of whose metrics is missing or not finite is left out.
      tasks: such as `PUBLISHED[pattern]`.

    Raises:
      ValueError: a value belongs to no metric of these tasks.
    """
    known = [metric.name for metrics in tasks.values() for metric in metrics]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown metrics {unknown}; there are {known}")
    means = {}
    for task, metrics in tasks.items():
        found = [values.get(metric.name, math.nan) for metric in metrics]
        if all(math.isfinite(value) for value in found):
            means[task] = statistics.fmean(
                metric.sign * (value - metric.mean) / metric.deviation
                for metric, value in zip(metrics, found, strict=True)
            )
    return Index(means, statistics.fmean(means.values()) if means else math.nan)


def estimate(rows: Mapping[str, Mapping[str, float]], tasks: Tasks) -> dict[str, tuple]:
    """Return the tasks with mean and standard deviation (of a sample) over the methods at hand.

    The published constants are such: those of masked language modelling follow from the published
    perplexities of ten methods.

    Args:
      rows: method -> metric -> value; what is not finite is left out.
      tasks: of which names and signs are kept. Metrics that fewer than two methods have, or on
        which all agree, are left out, and tasks without metrics, too.
    """
    found = {}
    for task, metrics in tasks.items():
        kept = []
        for metric in metrics:
            values = [row[metric.name] for row in rows.values() if metric.name in row]
            values = [value for value in values if math.isfinite(value)]
            if len(set(values)) > 1:
                moments = statistics.fmean(values), statistics.stdev(values)
                kept.append(Metric(metric.name, metric.sign, *moments))
        if kept:
            found[task] = tuple(kept)
    return found


def _tasks(**tasks):
    return {task: tuple(Metric(*metric) for metric in metrics) for task, metrics in tasks.items()}


PUBLISHED: dict[str, Tasks] = dict(
    zip(
        PATTERNS,
        (
            _tasks(
                tts=(
                    ("fastspeech2_mcd", -1, 3.4245, 0.06832),
                    ("fastspeech2_msd", -1, 1.97429, 0.0361768),
                    ("transformer_tts_mcd", -1, 4.06947, 0.09422),
                    ("transformer_tts_msd", -1, 2.19021, 0.03866),
                ),
                summarization=(
                    ("rouge1", 1, 34.88667, 1.39697),
                    ("rouge2", 1, 6.79333, 1.41078),
                    ("rougeL", 1, 31.96889, 1.31499),
                ),
                super_resolution=(("psnr", 1, 23.208, 0.27499), ("ssim", 1, 0.6758, 0.01557)),
                masked_language=(("perplexity", -1, 36.292, 62.30827),),
            ),
            _tasks(
                tts=(
                    ("transformer_tts_mcd", -1, 4.08325, 0.04529),
                    ("transformer_tts_msd", -1, 2.20085, 0.01372),
                ),
                summarization=(
                    ("rouge1", 1, 32.9575, 1.92754),
                    ("rouge2", 1, 6.0925, 0.41007),
                    ("rougeL", 1, 30.2575, 1.61951),
                ),
                language=(("perplexity", -1, 22.26, 8.29944),),
            ),
            _tasks(
                completion=(
                    ("cd_l1", -1, 7.7025, 0.64789),
                    ("cd_l2", -1, 0.24775, 0.03366),
                    ("f_score", 1, 0.7625, 0.03906),
                ),
                forecasting=(
                    ("ett_mse", -1, 1.18933, 0.05615),
                    ("ett_mae", -1, 0.80625, 0.02193),
                    ("ecl_mse", -1, 0.47575, 0.01057),
                    ("ecl_mae", -1, 0.511, 0.00601),
                    ("weather_mse", -1, 0.62025, 0.18948),
                    ("weather_mae", -1, 0.58075, 0.10312),
                ),
            ),
            _tasks(
                tts=(
                    ("transformer_tts_mcd", -1, 5.5037, 1.29239),
                    ("transformer_tts_msd", -1, 2.6278, 0.42726),
                ),
                summarization=(
                    ("rouge1", 1, 31.35, 3.77103),
                    ("rouge2", 1, 5.26, 1.26028),
                    ("rougeL", 1, 28.8, 3.28638),
                ),
            ),
        ),
        strict=True,
    )
)
"""Pattern -> task -> metrics, with the constants of the reference code."""
