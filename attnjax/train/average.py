# SPDX-License-Identifier: Apache-2.0
"""The mean of the parameters of a run's last checkpoints.

CAB (arXiv 2210.07661) evaluates super-resolution on the mean of the last five, because single ones
vary much. It needs no more memory than two sets of parameters.
"""

import logging
import os
from collections.abc import Sequence

import jax

from attnjax.errors import NoUsableCheckpoint, RecipeError
from attnjax.train.checkpoint import complete_steps, restore_params
from attnjax.typing import Params

_log = logging.getLogger(__name__)


def average_params(
    directory: str | os.PathLike,
    target: Params,
    count: int,
    prefixes: Sequence[str] = ("params",),
) -> tuple[Params, list[int]]:
    """Restore the newest sound checkpoints and return the mean of their parameters.

    Args:
      directory: folder of the steps; it is not changed.
      target: tree of `jax.ShapeDtypeStruct`s that carry shardings, or of arrays.
      count: how many checkpoints, at least 1.
      prefixes: see `train.checkpoint.restore_params`.

    Returns:
      The mean, sharded as the target, and the steps it is made of, newest first.

    Raises:
      RecipeError: `count` is below 1, or saved parameters do not fit the target.
      NoUsableCheckpoint: there are fewer sound checkpoints.
    """
    if count < 1:
        raise RecipeError(f"the mean of {count} checkpoints: must be at least 1")
    if count == 1:
        params, step = restore_params(directory, target, prefixes)
        return params, [step]
    add = jax.jit(lambda total, part: jax.tree.map(lambda a, b: a + b, total, part))
    total, used, problems = None, [], []
    for step in complete_steps(directory):
        try:
            params, _ = restore_params(directory, target, prefixes, step)
        except NoUsableCheckpoint as error:
            problems.append(str(error))
            _log.warning("left out of the mean: %s", error)
            continue
        total = params if total is None else add(total, params)
        used.append(step)
        if len(used) == count:
            return jax.jit(lambda tree: jax.tree.map(lambda x: x / count, tree))(total), used
    reasons = f" ({'; '.join(problems)})" if problems else ""
    raise NoUsableCheckpoint(
        f"the mean of {count} checkpoints needs as many, {directory} has {len(used)} sound ones"
        f"{reasons}; checkpoint.keep says how many a run keeps"
    )
