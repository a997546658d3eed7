# SPDX-License-Identifier: Apache-2.0
"""Paired timing with a clock that the test turns."""

import pytest

from attnjax.timing import Timing, alternate


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def worker(self, name, seconds):
        def work():
            self.calls.append(name)
            self.now += seconds

        return work


def test_contestants_take_turns_in_rotating_order():
    clock = Clock()
    workers = {"a": clock.worker("a", 1.0), "b": clock.worker("b", 4.0)}
    timings = alternate(workers, rounds=3, warmup=1, clock=lambda: clock.now)
    assert clock.calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timings["a"].seconds == (1.0, 1.0, 1.0)
    assert timings["b"].ratio(timings["a"]) == 4.0


def test_budget_ends_the_rounds_but_not_before_three():
    clock = Clock()
    timings = alternate(
        {"a": clock.worker("a", 10.0)}, rounds=50, warmup=0, budget=35.0, clock=lambda: clock.now
    )
    assert len(timings["a"].seconds) == 4
    timings = alternate(
        {"a": clock.worker("a", 10.0)}, rounds=50, warmup=0, budget=1.0, clock=lambda: clock.now
    )
    assert len(timings["a"].seconds) == 3


def test_median_and_quantiles():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 100.0))
    assert timing.median == 3.5
    assert (timing.quantile(0.2), timing.quantile(0.8)) == (2.0, 5.0)
    assert timing.to_dict() == {"median": 3.5, "low": 2.0, "high": 5.0, "rounds": 6}


def test_ratio_is_paired_by_round():
    # The machine was ten times slower in the second round, for both.
    assert Timing((2.0, 20.0, 2.0)).ratio(Timing((1.0, 10.0, 1.0))) == 2.0


@pytest.mark.parametrize("arguments", [({}, {}), ({"a": print}, {"rounds": 0})])
def test_refusals(arguments):
    contestants, options = arguments
    with pytest.raises(ValueError, match="need contestants"):
        alternate(contestants, **options)
