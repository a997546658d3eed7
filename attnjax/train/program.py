# SPDX-License-Identifier: Apache-2.0
"""A recipe bound to a mesh: the task, its sharded state, and the compiled functions of a run."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from attnjax import registry
from attnjax.errors import RecipeError
from attnjax.models.load import build as build_model
from attnjax.models.load import load_params
from attnjax.parallel import batch_sharding, replicated, tree_shardings
from attnjax.recipe import Recipe
from attnjax.tasks.task import Task
from attnjax.train.state import TrainState
from attnjax.train.step import make_init, make_step
from attnjax.typing import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Program:
    """What a recipe computes on a mesh. Functions must be called under `jax.set_mesh(mesh)`.

    Attributes:
      recipe, mesh, task: what it was built from.
      state: `TrainState` of `jax.ShapeDtypeStruct`s that carry their shardings.
      batch: the training batch, likewise.
      fallbacks: dimensions that stay replicated because the mesh does not divide them.
      step: jitted `(state, batch) -> (state, metrics)`; the old state is donated.
      evaluate: jitted `(params, batch) -> metric states`, replicated.
      explain: jitted `(params, batch) -> arrays for the report`.
    """

    recipe: Recipe
    mesh: Mesh
    task: Task
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    fallbacks: tuple[str, ...]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
    evaluate: Callable[[Params, Batch], dict[str, Any]]
    explain: Callable[[Params, Batch], dict[str, Any]]

    @property
    def parameter_count(self) -> int:
        """Number of trained scalars."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.state.params))

    def pretrained(self) -> Params | None:
        """Read the pretrained weights that the recipe names; None if it names none.

        Raises:
          RecipeError: the weights cannot be read or do not fit the model.
        """
        weights = self.recipe.model.get("weights")
        return load_params(self.task.model, weights, resize_positions=True) if weights else None

    def init(self) -> TrainState:
        """Create the sharded state of step 0, with the recipe's pretrained weights if it has any.

        Raises:
          RecipeError: as `pretrained`.
        """
        params = self.pretrained()
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        # Drawing initial values runs once: on CPU, compiling it well takes longer than it saves.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        init = jax.jit(
            make_init(self.task, self.recipe), out_shardings=shardings, compiler_options=quick
        )
        state = init(jax.random.key(self.recipe.seed))
        if params is None:
            return state
        place = functools.partial(jax.tree.map, lambda x, like: jax.device_put(x, like.sharding))
        params = place(params, state.params)
        ema = () if isinstance(state.ema, tuple) else jax.tree.map(jnp.copy, params)
        return dataclasses.replace(state, params=params, ema=ema)

    def to_device(self, batch: Batch, extras: Sequence[str] = ()) -> dict[str, Array]:
        """Turn this process's share of a batch (NumPy) into global sharded arrays.

        Only what the task reads, `valid` and the named extras travel to the devices.
        """
        sharding, kept = batch_sharding(self.mesh), {*self.batch, "valid", *extras}
        return {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()
            if name in kept
        }


def build_task(recipe: Recipe) -> Task:
    """Build the model and the task that a recipe names.

    Raises:
      RecipeError: the model or the task refuses its arguments.
    """
    fields = {k: v for k, v in recipe.model.items() if k not in ("name", "preset", "weights")}
    name = recipe.model["name"]
    try:
        model = build_model(name, recipe.model.get("preset") or None, **fields)
    except (RecipeError, TypeError, ValueError) as error:
        raise RecipeError(f"model {name}: {error}") from error
    options = {name: value for name, value in recipe.task.items() if name != "name"}
    try:
        return registry.resolve("task", recipe.task["name"])(model, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"task {recipe.task['name']}: {error}") from error


def build(recipe: Recipe, mesh: Mesh) -> Program:
    """Bind a validated recipe to a mesh without touching a device.

    Args:
      recipe: a recipe that passed `validate`.
      mesh: from `parallel.make_mesh`; its devices may be abstract.

    Returns:
      The program.

    Raises:
      RecipeError: the batch does not divide over the mesh, or the model refuses its arguments.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = recipe.optim.accumulate
    if recipe.batch % (ways * parts):
        raise RecipeError(
            f"batch={recipe.batch}: must be a multiple of mesh.data * mesh.fsdp * "
            f"optim.accumulate = {mesh.shape['data']} * {mesh.shape['fsdp']} * {parts}"
        )
    task = build_task(recipe)
    try:
        abstract = jax.eval_shape(make_init(task, recipe), jax.random.key(0))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RecipeError(f"model {recipe.model['name']}: {error}") from error
    shardings, notes = tree_shardings(abstract, mesh, task.param_axes)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    rows = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        for name, x in task.example(recipe.batch).items()
    }
    everywhere = replicated(mesh)
    return Program(
        recipe=recipe,
        mesh=mesh,
        task=task,
        state=state,
        batch=batch,
        fallbacks=tuple(n for n in notes if n.startswith("params/")),
        step=jax.jit(
            make_step(task, recipe),
            donate_argnums=0,
            in_shardings=(shardings, rows),
            out_shardings=(shardings, everywhere),
        ),
        evaluate=jax.jit(task.evaluate, out_shardings=everywhere),
        explain=jax.jit(task.explain, out_shardings=everywhere),
    )


def sharding_table(program: Program) -> str:
    """Return a text table of every parameter: path, shape, partition, bytes per device."""
    from attnjax.parallel.rules import leaf_path

    rows = []
    for key_path, leaf in jax.tree.leaves_with_path(program.state.params):
        local = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        spec = ", ".join("-" if axis is None else str(axis) for axis in leaf.sharding.spec)
        rows.append((leaf_path(key_path), str(tuple(leaf.shape)), f"({spec})", f"{local:,}"))
    rows.insert(0, ("parameter", "shape", "partition", "bytes/device"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows
    )
