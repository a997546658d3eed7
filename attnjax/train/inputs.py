# SPDX-License-Identifier: Apache-2.0
"""The data of a run, opened and held against what the model expects before anything is compiled."""

import contextlib
from collections.abc import Iterator

from attnjax.data.iterator import TrainIterator, eval_batches, train_iterator
from attnjax.errors import RecipeError
from attnjax.parallel import process_shard
from attnjax.train.program import Program
from attnjax.typing import Batch


def open_data(program: Program) -> tuple[TrainIterator, dict[str, int]]:
    """Open the training data and check that all batches are what the model expects.

    Args:
      program: the recipe bound to its mesh.

    Returns:
      The training iterator of this process, at its first batch, and the number of examples of every
      set by the name of its recipe section.

    Raises:
      RecipeError: data is missing, or an array has another name, shape or type than the model's.
    """
    sizes = check_evals(program)
    recipe, shard = program.recipe, process_shard(program.mesh)
    with _naming("data"):
        iterator = train_iterator(recipe.data, recipe.seed, recipe.batch, *shard)
    try:
        check_batch(program, iterator.peek(), "data", recipe.batch // shard[1])
    except BaseException:
        iterator.close()
        raise
    return iterator, {"data": iterator.examples, **sizes}


def check_evals(program: Program) -> dict[str, int]:
    """Check the first batch of every evaluation and return how many examples each has.

    Raises:
      RecipeError: as `open_data`, or a batch size does not divide over the mesh.
    """
    recipe, shard = program.recipe, process_shard(program.mesh)
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    sizes = {}
    for name, evaluation in recipe.evals.items():
        batch = evaluation.batch or recipe.batch
        if batch % ways:
            raise RecipeError(
                f"evals.{name}.batch={batch}: must be a multiple of mesh.data * mesh.fsdp = {ways}"
            )
        with _naming(f"evals.{name}.data"):
            batches = eval_batches(evaluation.data, batch, *shard)
        check_batch(program, next(batches), f"evals.{name}", batch // shard[1])
        batches.close()
        sizes[f"evals.{name}"] = batches.examples
    return sizes


def check_batch(program: Program, rows: Batch, where: str, count: int) -> None:
    """Compare one process's rows with the training batch that the task expects.

    Axes that the task names in `free_axes` may have any size in evaluation.

    Raises:
      RecipeError: names the array and both shapes or types.
    """
    program.task.check(rows)
    for name, expected in program.batch.items():
        free = program.task.free_axes.get(name, ()) if where != "data" else ()
        sizes = enumerate(rows[name].shape)
        shape = (count, *expected.shape[1:])
        if rows[name].ndim == len(shape):
            shape = tuple(size if axis in free else shape[axis] for axis, size in sizes)
        if tuple(rows[name].shape) != shape or rows[name].dtype != expected.dtype:
            raise RecipeError(
                f"{where}: {name!r} is {rows[name].dtype}{list(rows[name].shape)}, but the model "
                f"expects {expected.dtype}{list(shape)}"
            )


@contextlib.contextmanager
def _naming(section: str) -> Iterator[None]:
    """Complete the names of fields in refusals: sources and pipelines know only their own part."""
    try:
        yield
    except RecipeError as error:
        if str(error).startswith(("source.", "pipeline.")):
            raise RecipeError(f"{section}.{error}") from error
        raise
