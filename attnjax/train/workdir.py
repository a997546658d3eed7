# SPDX-License-Identifier: Apache-2.0
"""The run directory: whose it is, and what is written into it before the first step."""

import pathlib

import jax

from attnjax.errors import RecipeError
from attnjax.recipe import Recipe, differences
from attnjax.train import report


def check_workdir(recipe: Recipe, workdir: pathlib.Path, resume: str) -> None:
    """Refuse a run directory that cannot be used, before anything is written.

    Raises:
      RecipeError: the path is no folder, or it belongs to another recipe (differences are listed).
    """
    if resume not in ("auto", "force", "never"):
        raise RecipeError(f"resume={resume!r}: must be auto, force or never")
    if workdir.exists() and not workdir.is_dir():
        raise RecipeError(f"workdir {workdir} is not a folder")
    record = workdir / "recipe.json"
    if not record.exists():
        return
    if resume == "never":
        raise RecipeError(f"workdir {workdir} already holds a run; choose another")
    try:
        previous = Recipe.from_json(record.read_text()).identity()
    except (RecipeError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{record} cannot be read: {error}") from error
    changed = differences(previous, recipe.identity())
    if changed and resume != "force":
        raise RecipeError(
            f"workdir {workdir} belongs to another recipe (--resume=force continues anyway): "
            + "; ".join(changed[:10])
        )


def prepare_workdir(recipe: Recipe, workdir: pathlib.Path) -> None:
    """Create the run directory with the recipe and a record of the environment (process 0 only).

    Raises:
      RecipeError: the directory cannot be written.
    """
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        report.write_atomically(workdir / "recipe.json", recipe.to_json())
        report.write_environment(workdir)
    except OSError as error:
        raise RecipeError(f"workdir {workdir} cannot be written: {error}") from error
