# SPDX-License-Identifier: Apache-2.0
"""Paired timing: contestants take turns in one process, so that a busy machine slows all alike."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call of one contestant, one entry per round.

    Attributes:
      seconds: one measurement per round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Return the measurement below which this share of all lies (nearest rank)."""
        ordered = sorted(self.seconds)
        return ordered[round(share * (len(ordered) - 1))]

    def ratio(self, other: "Timing") -> float:
        """Return the median over rounds of this time divided by the other's in the same round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def to_dict(self) -> dict[str, float]:
        """Return median, 20 % and 80 % quantiles in seconds, and the number of rounds."""
        return {
            "median": self.median,
            "low": self.quantile(0.2),
            "high": self.quantile(0.8),
            "rounds": len(self.seconds),
        }


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    budget: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in turns.

    Every round calls each contestant once; the order is rotated from round to round, so that no one
    always runs after the same neighbour.

    Args:
      contestants: name -> function that does the work and waits for its result.
      rounds: rounds to time.
      warmup: calls of each before the clock starts.
      budget: seconds after which no further round is started; at least three rounds are timed.
      clock: monotonic seconds.

    Returns:
      Name -> timing, with the same number of rounds for all.

    Raises:
      ValueError: no contestants, or fewer than one round.
    """
    if not contestants or rounds < 1:
        raise ValueError(f"need contestants and rounds >= 1, got {list(contestants)} and {rounds}")
    names = list(contestants)
    for name in names:
        for _ in range(warmup):
            contestants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begun = clock()
    for turn in range(rounds):
        if turn >= 3 and clock() - begun > budget:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
