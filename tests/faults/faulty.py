# SPDX-License-Identifier: Apache-2.0
"""The training launcher with a data source that misbehaves, for runs in processes of their own.

Run:     python -m tests.faults.faulty --config=tests/faults/tiny.py:faulty --workdir=DIR
         --config.data.source.fault=hang --config.data.source.process=1

FAULTY_VERSION pretends another version of the library; FAULTY_IDS names a file that gets the
example ids of this process, one JSON line per step.
"""

import functools
import json
import os
import time

import jax
import numpy as np

import attnjax
from attnjax import registry
from attnjax.data.synthetic import InformationExchange
from attnjax.errors import RecipeError
from attnjax.train import loop
from launch import command, train


class Faulty(InformationExchange):
    """InformationExchange with a fault on one process.

    Args:
      fault: "raise" or "hang" when a record is read, "nan" in the record, "small" for a set of half
        the size, "missing" for no set at all, "" for none.
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
        if self._fault == "missing":
            raise RecipeError("source.root: no such folder")
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
                example["fine"][:] = np.nan
        return example


def hang_for_ever() -> None:
    """Be the name that a dump of all stacks must show."""
    while True:
        time.sleep(1)


def note_ids(step: int, rows) -> None:
    """Write down the examples of a step."""
    with open(os.environ["FAULTY_IDS"], "a") as file:
        file.write(json.dumps({"step": step + 1, "ids": rows["index"].tolist()}) + "\n")


registry.SOURCES["faulty"] = "tests.faults.faulty:Faulty"
attnjax.__version__ = os.environ.get("FAULTY_VERSION", attnjax.__version__)
if "FAULTY_IDS" in os.environ:
    loop.run = functools.partial(loop.run, on_step=note_ids)

if __name__ == "__main__":
    command.run(train.main)
