# SPDX-License-Identifier: Apache-2.0
"""How many examples per second the input pipeline makes on its own, per number of workers."""

import dataclasses
import time
from collections.abc import Iterable

from attnjax import recipe
from attnjax.data.iterator import train_iterator


@dataclasses.dataclass(frozen=True)
class Throughput:
    """One measurement.

    Attributes:
      workers: preprocessing processes; 0 is threads of this process.
      prefetch: batches prepared ahead, per worker.
      batch: examples per batch on this process.
      examples_per_second: after the warm-up.
      first_batch_seconds: from construction to the first batch, workers started included.
    """

    workers: int
    prefetch: int
    batch: int
    examples_per_second: float
    first_batch_seconds: float


def measure(
    data: recipe.Data,
    batch: int,
    *,
    seed: int = 0,
    workers: Iterable[int] | None = None,
    seconds: float = 5.0,
    least_batches: int = 4,
) -> list[Throughput]:
    """Time the training iterator alone, without a model.

    What was prepared ahead before the clock starts would flatter the result, so the warm-up takes
    as many batches as the iterator may hold, and the clock runs until batches of about as many
    again have been made or `seconds` have passed, whichever is later.

    Args:
      data: the recipe's data section.
      batch: examples per batch.
      seed: decides order and augmentation, as in training.
      workers: worker counts to try; by default the recipe's own.
      seconds: least time measured per worker count.
      least_batches: least batches measured per worker count.

    Returns:
      One measurement per worker count, in the order given.
    """
    counts = [data.workers] if workers is None else list(workers)
    return [_measure(data, batch, seed, count, seconds, least_batches) for count in counts]


def _measure(data, batch, seed, workers, seconds, least_batches):
    buffered = data.prefetch * max(1, workers)
    begun = time.perf_counter()
    iterator = train_iterator(dataclasses.replace(data, workers=workers), seed, batch)
    try:
        next(iterator)
        first = time.perf_counter() - begun
        for _ in range(buffered):
            next(iterator)
        begun, made = time.perf_counter(), 0
        while True:
            next(iterator)
            made += 1
            elapsed = time.perf_counter() - begun
            if elapsed >= seconds and made >= max(least_batches, buffered):
                break
    finally:
        iterator.close()
    return Throughput(workers, data.prefetch, batch, made * batch / elapsed, first)
