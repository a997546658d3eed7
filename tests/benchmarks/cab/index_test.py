# SPDX-License-Identifier: Apache-2.0
"""The compositional index: published rows, re-estimated constants, what is missing."""

import math

import pytest

from attnjax.benchmarks.cab.index import PUBLISHED, Metric, estimate, score
from attnjax.ops.efficient import PATTERNS

SOFTMAX = {
    "noncausal_self": (3.4748, 1.9735, 4.0953, 2.1985, 34.61, 6.35, 31.66, 23.18, 0.675, 3.42),
    "noncausal_cross": (
        7.425, 0.231, 0.779, 1.138167, 0.77467, 0.478, 0.508, 0.449, 0.4855,
    ),
    "causal_cross": (4.0953, 2.1985, 34.61, 6.35, 31.66),
}  # fmt: skip
"""Published metrics of softmax attention, in the order of the constants."""

EXPECTED = {
    "noncausal_self": (
        {
            "tts": -0.3007,
            "summarization": -0.2491,
            "super_resolution": -0.0766,
            "masked_language": 0.5276,
        },
        -0.0247,
    ),
    "noncausal_cross": ({"completion": 0.4495, "forecasting": 0.7442}, 0.5968),
    "causal_cross": ({}, 0.9569),
}
"""What the reference script prints for them."""


def named(pattern, values):
    names = [metric.name for metrics in PUBLISHED[pattern].values() for metric in metrics]
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("pattern", SOFTMAX)
def test_published_rows(pattern):
    tasks, total = EXPECTED[pattern]
    found = score(named(pattern, SOFTMAX[pattern]), PUBLISHED[pattern])
    assert found.total == pytest.approx(total, abs=6e-5)
    for task, value in tasks.items():
        assert found.tasks[task] == pytest.approx(value, abs=6e-5), task


def test_constants_are_those_of_ten_published_methods():
    """Perplexities of masked language models as the readme prints them."""
    published = {
        "softmax": 3.42, "long_short": 3.38, "local": 4.18, "cosformer": 5.25, "nystrom": 6.32,
        "lara": 6.45, "abc": 10.50, "s4d": 25.34, "performer": 111.73, "prob_sparse": 186.35,
    }  # fmt: skip
    rows = {name: {"perplexity": value} for name, value in published.items()}
    (metric,) = estimate(rows, PUBLISHED["noncausal_self"])["masked_language"]
    (constant,) = PUBLISHED["noncausal_self"]["masked_language"]
    assert metric.mean == pytest.approx(constant.mean, abs=1e-5)
    assert metric.deviation == pytest.approx(constant.deviation, abs=1e-5)


def test_estimated_indices_have_mean_zero():
    tasks = {"one": (Metric("up", 1), Metric("down", -1)), "two": (Metric("flat", 1),)}
    rows = {"a": {"up": 1.0, "down": 5.0, "flat": 2.0}, "b": {"up": 3.0, "down": 2.0, "flat": 2.0}}
    found = estimate(rows, tasks)
    assert set(found) == {"one"}  # all agree about the other
    strip = lambda row: {name: value for name, value in row.items() if name != "flat"}
    totals = [score(strip(row), found).total for row in rows.values()]
    assert sum(totals) == pytest.approx(0) and totals[1] == pytest.approx(0.5**0.5)


def test_tasks_without_results_are_left_out():
    tasks = PUBLISHED["causal_self"]
    found = score({"perplexity": 22.26, "rouge1": 30.0, "rouge2": math.inf}, tasks)
    assert found.tasks == {"language": 0.0} and found.total == 0
    assert math.isnan(score({}, tasks).total)
    with pytest.raises(ValueError, match=r"unknown metrics \['ppl'\]"):
        score({"ppl": 3.0}, tasks)
    with pytest.raises(ValueError, match="sign=0 must be 1 or -1"):
        Metric("x", 0)
    with pytest.raises(ValueError, match=r"deviation=0.0 must be above 0"):
        Metric("x", 1, 0.0, 0.0)
    assert tuple(PUBLISHED) == PATTERNS
