# SPDX-License-Identifier: Apache-2.0
"""Exact evaluation over a finite set, sharded over devices and processes."""

import contextlib

import jax
import numpy as np

from attnjax.data.iterator import eval_batches
from attnjax.parallel import process_shard
from attnjax.recipe import Evaluation
from attnjax.train.guards import Watchdog
from attnjax.train.program import Program
from attnjax.typing import Params


def evaluate(
    program: Program,
    params: Params,
    evaluation: Evaluation,
    watchdog: Watchdog | None = None,
) -> dict[str, object]:
    """Compute the task's metrics over every example of a set, each counted once.

    Args:
      program: supplies the jitted `evaluate` and the mesh; call under `jax.set_mesh`.
      params: parameters to evaluate, sharded as the program's.
      evaluation: the set and its batch size (0: the training batch).
      watchdog: told about every batch, and not to count compilation.

    Returns:
      Metric name -> float, or NumPy array for matrices. Equal on every process.
    """
    batch = evaluation.batch or program.recipe.batch
    total = None
    for rows in eval_batches(evaluation.data, batch, *process_shard(program.mesh)):
        compiles = watchdog is not None and total is None
        with watchdog.paused() if compiles else contextlib.nullcontext():
            states = program.evaluate(params, program.to_device(rows, program.task.extras))
            if compiles:
                jax.block_until_ready(states)
        if total is None:
            total = states
        else:
            total = {name: total[name].merge(state) for name, state in states.items()}
        if watchdog is not None:
            watchdog.beat()
    values = {name: state.compute() for name, state in (total or {}).items()}
    return {name: _host(value) for name, value in values.items()}


def scalars(values: dict[str, object]) -> dict[str, float]:
    """Keep the metrics that are single numbers."""
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _host(value):
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array
