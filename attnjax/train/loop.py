# SPDX-License-Identifier: Apache-2.0
"""The one training loop: set up, restore, then step, guard, log, evaluate, save until done."""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import attnjax
from attnjax.data.iterator import eval_batches, train_iterator
from attnjax.errors import Preempted, RecipeError
from attnjax.parallel import make_mesh, process_shard
from attnjax.parallel.process import require_agreement
from attnjax.recipe import Recipe
from attnjax.train import report
from attnjax.train.checkpoint import Checkpointer
from attnjax.train.evaluate import evaluate, scalars
from attnjax.train.guards import BadStepGuard, StopRequest, Watchdog
from attnjax.train.program import Program, build, sharding_table
from attnjax.train.state import TrainState
from attnjax.train.workdir import check_workdir, prepare_workdir
from attnjax.typing import Batch

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      step: last step taken.
      metrics: final metrics by name, such as "val/accuracy" and "train/loss".
      state: the final state.
      seconds: wall time of this call.
    """

    step: int
    metrics: dict[str, float]
    state: TrainState
    seconds: float


def run(
    recipe: Recipe,
    workdir: str | pathlib.Path,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    hang_timeout: float = 0.0,
    on_step: Callable[[int, Batch], None] | None = None,
) -> RunResult | None:
    """Train a recipe in a run directory, continuing whatever the directory already holds.

    Args:
      recipe: validated here before anything else happens.
      workdir: run directory (`recipe.json`, `environment.json`, `metrics.jsonl`, `checkpoints/`,
        `report/`).
      resume: `auto` continues a run of the same recipe and refuses another's; `force` continues
        with this recipe anyway; `never` refuses a directory that holds a run.
      dry_run: check recipe, model, mesh and data, print the sharding table, write nothing.
      hang_timeout: seconds without a finished step after which the process dumps its stacks and
        exits; 0 waits for ever.
      on_step: called with (step, host batch) before each step, for tests and instruments.

    Returns:
      The result, or None for a dry run.

    Raises:
      RecipeError: recipe, mesh, data or run directory cannot work.
      Preempted: a signal stopped the run; its state is saved.
      NoUsableCheckpoint: checkpoints exist and none can be restored.
      Diverged: too many bad steps in a row.
    """
    start = time.monotonic()
    recipe.validate()
    mesh = make_mesh(dataclasses.asdict(recipe.mesh))
    program = build(recipe, mesh)
    workdir = pathlib.Path(workdir)
    iterator = open_data(program)
    try:
        check_workdir(recipe, workdir, resume)
        require_agreement(
            {"recipe": recipe.digest(), "attnjax": attnjax.__version__, "jax": jax.__version__}
        )
        if dry_run:
            _print_plan(program)
            return None
        with jax.set_mesh(mesh):
            return _run(program, workdir, iterator, start, hang_timeout, on_step)
    finally:
        iterator.close()


def _run(program: Program, workdir, iterator, start, hang_timeout, on_step) -> RunResult:
    recipe = program.recipe
    prepare_workdir(recipe, workdir)
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        every=recipe.checkpoint.every,
        keep=recipe.checkpoint.keep,
        best=recipe.checkpoint.best,
    )
    restored = checkpointer.restore(program.state)
    if restored is None:
        state, step = program.init(), 0
    else:
        state, data_state, _, step = restored
        iterator.set_state(data_state)
        _log.info("continuing from step %d", step)
    for note in program.fallbacks:
        _log.info("replicated: %s", note)
    _log.info("%s parameters, mesh %s", f"{program.parameter_count:,}", dict(program.mesh.shape))

    writer = report.MetricsWriter(workdir, step, recipe.report.tensorboard)
    progress = report.Progress(
        recipe.steps, recipe.batch, program.task.flops, first_step=step, every=recipe.report.every
    )
    profiler = report.Profiler(workdir, recipe.report.profile_start, recipe.report.profile_steps)
    guard = BadStepGuard(workdir, recipe.guard.patience)
    finals: dict[str, Any] = {}
    with StopRequest() as stop, Watchdog(hang_timeout) as watchdog:
        try:
            pending = None
            while step < recipe.steps:
                rows = next(iterator)
                program.task.check(rows)
                if on_step is not None:
                    on_step(step, rows)
                profiler.at(step)
                state, metrics = program.step(state, program.to_device(rows))
                step += 1
                # One step behind, so that reading metrics never leaves the devices idle.
                if pending is not None:
                    guard.observe(*pending)
                pending = (step, metrics, rows.get("index"))
                last, stopping = step == recipe.steps, stop.requested(step)
                logs = step % recipe.report.every == 0 or last
                saves = checkpointer.should_save(step) or last or stopping
                due = [
                    n for n, e in recipe.evals.items() if last or (e.every and step % e.every == 0)
                ]
                if logs or saves or due:
                    guard.observe(*pending)
                    values = _numbers(metrics, "train/")
                    pending = None
                watchdog.beat()
                if logs:
                    writer.write(step, values)
                    progress.log(step, values)
                scores = {}
                for name in due:
                    results = evaluate(program, state.averaged, recipe.evals[name])
                    scores.update({f"{name}/{k}": v for k, v in scalars(results).items()})
                    finals.update({f"{name}/{k}": v for k, v in results.items()})
                    watchdog.beat()
                if scores:
                    writer.write(step, scores)
                    progress.note(step, scores)
                if saves:
                    checkpointer.save(
                        step,
                        state,
                        data_state=iterator.get_state(),
                        record={"recipe": recipe.digest(), "attnjax": attnjax.__version__},
                        metrics=scores,
                        force=last or stopping,
                    )
                if stopping and not last:
                    checkpointer.wait()
                    raise Preempted(f"stopped by a signal after step {step}; run again to continue")
            checkpointer.wait()
        finally:
            profiler.close()
            writer.close()
            progress.close()
            checkpointer.close()
        if not finals:  # The directory already held the finished run.
            for name, evaluation in recipe.evals.items():
                results = evaluate(program, state.averaged, evaluation)
                finals.update({f"{name}/{k}": v for k, v in results.items()})
        seconds = time.monotonic() - start
        explanation = _explain(program, state)
        if jax.process_index() == 0:
            path = report.final_report(workdir, recipe.to_dict(), finals, explanation, seconds)
            _log.info("report: %s", path)
    return RunResult(step, scalars(finals), state, seconds)


def open_data(program: Program):
    """Open the training data and check that its batches are what the model expects.

    Args:
      program: the recipe bound to its mesh.

    Returns:
      The training iterator of this process, at its first batch.

    Raises:
      RecipeError: data is missing, or an array has another name, shape or type than the model's.
    """
    recipe, shard = program.recipe, process_shard(program.mesh)
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    for name, evaluation in recipe.evals.items():
        batch = evaluation.batch or recipe.batch
        if batch % ways:
            raise RecipeError(
                f"evals.{name}.batch={batch}: must be a multiple of mesh.data * mesh.fsdp = {ways}"
            )
        rows = next(iter(eval_batches(evaluation.data, batch, *shard)))
        check_batch(program, rows, f"evals.{name}", batch // shard[1])
    iterator = train_iterator(recipe.data, recipe.seed, recipe.batch, *shard)
    try:
        check_batch(program, iterator.peek(), "data", recipe.batch // shard[1])
    except BaseException:
        iterator.close()
        raise
    return iterator


def check_batch(program: Program, rows: Batch, where: str, count: int) -> None:
    """Compare one process's rows with the training batch that the task expects.

    Raises:
      RecipeError: names the array and both shapes or types.
    """
    program.task.check(rows)
    for name, expected in program.batch.items():
        shape = (count, *expected.shape[1:])
        if tuple(rows[name].shape) != shape or rows[name].dtype != expected.dtype:
            raise RecipeError(
                f"{where}: {name!r} is {rows[name].dtype}{list(rows[name].shape)}, but the model "
                f"expects {expected.dtype}{list(shape)}"
            )


def _numbers(metrics, prefix: str) -> dict[str, float]:
    return {prefix + name: float(value) for name, value in jax.device_get(metrics).items()}


def _explain(program: Program, state: TrainState) -> dict[str, np.ndarray] | None:
    """Look at a few held-out examples: predictions and attention maps for the report."""
    recipe = program.recipe
    if not recipe.report.samples or not recipe.evals:
        return None
    evaluation = next(iter(recipe.evals.values()))
    batch = evaluation.batch or recipe.batch
    rows = next(iter(eval_batches(evaluation.data, batch, *process_shard(program.mesh))))
    shown = jax.device_get(program.explain(state.averaged, program.to_device(rows)))
    return jax.tree.map(lambda x: np.asarray(x)[: recipe.report.samples], shown)


def _print_plan(program: Program) -> None:
    recipe = program.recipe
    print(json.dumps(recipe.to_dict(), indent=2))
    print(sharding_table(program))
    for note in program.fallbacks:
        print("replicated:", note)
    print(f"mesh: {dict(program.mesh.shape)} over {program.mesh.size} devices")
    print(f"parameters: {program.parameter_count:,}")
    print(f"training flops per step: {program.task.flops * recipe.batch:.3e}")
