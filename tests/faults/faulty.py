# SPDX-License-Identifier: Apache-2.0
"""The training launcher with a data source that misbehaves, for runs in processes of their own.

Run:     python -m tests.faults.faulty --config=tests/faults/tiny.py --workdir=DIR
         --config.data.source.name=faulty --config.data.source.fault=hang
"""

import time

import jax
import numpy as np

from attnjax import registry
from attnjax.data.synthetic import InformationExchange
from launch import command, train


class Faulty(InformationExchange):
    """InformationExchange with a fault on one process.

    Args:
      fault: "raise" or "hang" when a record is read, "nan" in the record, "small" for a set of half
        the size, "" for none.
      process: index of the process that has it; -1: all of them.
      after: records that this process reads before the first fault.
      count: records with the fault.
    """

    def __init__(
        self,
        seed: int = 3,
        size: int = 131_072,
        fault: str = "",
        process: int = -1,
        after: int = 0,
        count: int = 1_000_000,
    ):
        mine = process in (-1, jax.process_index())
        self._fault = fault if mine else ""
        super().__init__(seed=seed, size=size // 2 if self._fault == "small" else size)
        self._window, self._reads = range(after, after + count), 0

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = super().__getitem__(index)
        self._reads += 1
        if self._reads - 1 in self._window:
            if self._fault == "raise":
                raise OSError("planted fault")
            if self._fault == "hang":
                hang_for_ever()
            if self._fault == "nan":
                example["fine"][0, 0] = np.nan
        return example


def hang_for_ever() -> None:
    """Be the name that a dump of all stacks must show."""
    while True:
        time.sleep(1)


registry.SOURCES["faulty"] = "tests.faults.faulty:Faulty"

if __name__ == "__main__":
    command.run(train.main)
