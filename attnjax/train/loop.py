# SPDX-License-Identifier: Apache-2.0
"""The one training loop: set up, restore, then step, guard, log, evaluate, save until done."""

import contextlib
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
from attnjax.data.iterator import eval_batches
from attnjax.errors import Preempted
from attnjax.parallel import make_mesh, process_shard
from attnjax.parallel.process import together
from attnjax.recipe import Recipe
from attnjax.train import report
from attnjax.train.checkpoint import Checkpointer, latest_step, require_fit
from attnjax.train.evaluate import evaluate, scalars
from attnjax.train.guards import BadStepGuard, StopRequest, Watchdog, require_finite
from attnjax.train.inputs import open_data
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
      hang_timeout: seconds without progress after which the process dumps its stacks and exits;
        compiling, restoring and saving may take longer. 0 waits for ever.
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
    workdir, iterator = pathlib.Path(workdir), None
    with Watchdog(hang_timeout) as watchdog:
        try:
            # Each part ends with an agreement, so that processes stop together or not at all.
            with together() as facts:
                recipe.validate()
                facts |= {"recipe": recipe.to_dict(), "resume": resume, "dry_run": dry_run}
                facts |= {"attnjax": attnjax.__version__, "jax": jax.__version__}
            with together() as facts:
                program = build(recipe, make_mesh(dataclasses.asdict(recipe.mesh)))
                iterator, facts["examples"] = open_data(program)
                check_workdir(recipe, workdir, resume)
                require_fit(workdir / "checkpoints", program.state)
                if latest_step(workdir / "checkpoints") is None:
                    program.pretrained()  # Read again later: bad weights must not leave a trace.
            if dry_run:
                _print_plan(program)
                return None
            with together():
                prepare_workdir(recipe, workdir)
            watchdog.beat()
            with jax.set_mesh(program.mesh), StopRequest() as stop:
                return _run(program, workdir, iterator, start, on_step, stop, watchdog)
        finally:
            if iterator is not None:
                iterator.close()


def _run(program, workdir, iterator, start, on_step, stop, watchdog) -> RunResult:
    recipe = program.recipe
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        every=recipe.checkpoint.every,
        keep=recipe.checkpoint.keep,
        best=recipe.checkpoint.best,
    )
    with watchdog.paused():
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
    guard.rewind(step)
    finals: dict[str, Any] = {}
    pending, is_compiled = None, False
    try:
        while step < recipe.steps:
            rows = next(iterator)
            program.task.check(rows)
            if on_step is not None:
                on_step(step, rows)
            profiler.at(step)
            with contextlib.nullcontext() if is_compiled else watchdog.paused():
                state, metrics = program.step(state, program.to_device(rows))
                if not is_compiled:
                    # Other processes may compile for longer than this one.
                    jax.block_until_ready(metrics)
            is_compiled = True
            step += 1
            # One step behind, so that reading metrics never leaves the devices idle.
            if pending is not None:
                guard.observe(*pending)
            pending = (step, metrics, rows.get("index"))
            last, stopping = step == recipe.steps, stop.requested(step)
            logs = step % recipe.report.every == 0 or last
            saves = checkpointer.should_save(step) or last or stopping
            due = [n for n, e in recipe.evals.items() if last or (e.every and step % e.every == 0)]
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
                results = evaluate(program, state.averaged, recipe.evals[name], watchdog)
                scores.update({f"{name}/{k}": v for k, v in scalars(results).items()})
                finals.update({f"{name}/{k}": v for k, v in results.items()})
            if scores:
                writer.write(step, scores)
                progress.note(step, scores)
            if saves and (last or stopping or not guard.streak):
                require_finite(step, state)
                with watchdog.paused():
                    checkpointer.save(
                        step,
                        state,
                        data_state=iterator.get_state(),
                        record={"recipe": recipe.digest(), "attnjax": attnjax.__version__},
                        metrics=scores,
                        force=last or stopping,
                    )
            if stopping and not last:
                raise Preempted(f"stopped by a signal after step {step}; run again to continue")
    finally:
        profiler.close()
        writer.close()
        progress.close()
        with watchdog.paused():
            checkpointer.close()
    if not finals:  # The directory already held the finished run.
        for name, evaluation in recipe.evals.items():
            results = evaluate(program, state.averaged, evaluation, watchdog)
            finals.update({f"{name}/{k}": v for k, v in results.items()})
    seconds = time.monotonic() - start
    with watchdog.paused():
        explanation = _explain(program, state)
        if jax.process_index() == 0:
            path = report.final_report(
                workdir, recipe.to_dict(), finals, explanation, seconds, flops=program.task.flops
            )
            _log.info("report: %s", path)
    return RunResult(step, scalars(finals), state, seconds)


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
