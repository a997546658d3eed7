# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring the state of a run, so that nothing damaged or foreign is ever trained on.

A step is one folder, `<directory>/<step>`, complete once its commit file exists. It holds the
arrays (`state`) and one JSON text (`run`): the position in the data, the caller's record, the
metrics and the integrity sums of everything. Restoring walks from the newest complete step
downwards until one passes every check.
"""

import logging
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from attnjax.errors import AttnjaxError, NoUsableCheckpoint, RecipeError
from attnjax.train import integrity
from attnjax.train.integrity import Damaged
from attnjax.typing import Params

_COMMIT_FILE = "commit_success.txt"
_STATE, _RUN = "state", "run"
_RUN_FILE = "metadata"
_ORBAX_FILES = {"_CHECKPOINT_METADATA", _STATE, _RUN}
_LISTED = 10
"""Differing paths shown in one message; more hide the reason rather than show it."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves steps in the background, keeps the newest and the best, restores the newest sound one.

    With several processes, every process makes the same calls in the same order.

    Args:
      directory: folder of the steps; created when missing.
      every: steps between saves, see `should_save`.
      keep: number of newest steps to keep.
      best: name of a metric; the step with its highest value is kept as well.
      on_message: receives one line per save, restore or refusal, on process 0 only.

    Raises:
      AttnjaxError: the folder cannot be created.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        every: int,
        keep: int,
        best: str = "",
        on_message: Callable[[str], None] = _log.info,
    ):
        self.directory = pathlib.Path(directory).absolute()
        self.every = every
        self._retention = _Retention(keep, best)
        self._on_message = on_message
        self._manager: ocp.CheckpointManager | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AttnjaxError(f"cannot create {self.directory}: {error}") from error

    def should_save(self, step: int) -> bool:
        """Tell whether a save is scheduled after this many steps."""
        return step > 0 and step % self.every == 0

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        record: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Start saving a step; the arrays are copied before this returns, so they may be donated.

        Args:
          step: number of steps taken.
          state: tree of `jax.Array`s, typed keys included.
          data_state: JSON values that say where the data continues.
          record: JSON values that say what wrote this (recipe digest, versions).
          metrics: evaluation results of this step, for `best`.
          force: save even when the step is not scheduled.

        Returns:
          Whether a save was started; False when it is not scheduled or this step is already saved.

        Raises:
          AttnjaxError: this or an earlier save could not be written. Steps that were complete
            before stay restorable.
        """
        if not (force or self.should_save(step)):
            return False
        manager = self._open()
        if step in manager.all_steps():
            return False
        leaves = integrity.flatten(state)
        run = integrity.seal(
            {
                "step": step,
                "data": data_state,
                "record": record,
                "metrics": dict(metrics or {}),
                "arrays": {path: integrity.describe(leaf) for path, leaf in leaves.items()},
                "checksums": integrity.checksums(leaves),
            }
        )
        self._retention.observe(step, metrics)
        arrays = {
            p: jax.random.key_data(x) if integrity.is_key(x) else x for p, x in leaves.items()
        }
        arguments = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(_nest(arrays)), _RUN: ocp.args.JsonSave(run)}
        )
        self._write(lambda: manager.save(step, args=arguments, force=True))
        self._say(f"saving step {step} to {self.directory}")
        return True

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
          AttnjaxError: it could not be written.
        """
        if self._manager is not None:
            self._write(self._manager.wait_until_finished)

    def restore(self, target: Any) -> tuple[Any, dict, dict, int] | None:
        """Restore the newest step that passes every check.

        Args:
          target: tree of `jax.ShapeDtypeStruct`s that carry shardings (or of arrays). The mesh may
            differ from the one that saved.

        Returns:
          The state, the data state, the record and the step; None when nothing was ever saved.

        Raises:
          RecipeError: a sound step differs from the target in structure, shape or dtype.
          NoUsableCheckpoint: steps exist and all of them are damaged.
        """
        refused: dict[int, str] = {}
        unfinished = _unfinished_steps(self.directory)
        for step in _agreed_steps(self.directory):
            folder = self.directory / str(step)
            body, problem = _agree(lambda: _read_run(folder, step))
            if problem is None:
                _require_match(folder, body["arrays"], target)
                state, problem = _read_state(folder, body, target)
            if problem is None:
                self._set_aside(refused, step)
                skipped = [s for s in unfinished if s > step]
                if skipped:
                    self._say(f"warning: ignored step {skipped[0]}, whose save never finished")
                return state, body["data"], body["record"], step
            refused[step] = problem
        if not refused:
            return None
        reasons = "; ".join(f"step {step}: {problem}" for step, problem in refused.items())
        raise NoUsableCheckpoint(f"no usable checkpoint in {self.directory}: {reasons}")

    def close(self) -> None:
        """Wait for the save in flight and release threads.

        Raises:
          AttnjaxError: it could not be written.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            self._write(manager.close)

    def _open(self) -> ocp.CheckpointManager:
        """Return the manager of saves, created by the first one so that reading changes nothing."""
        if self._manager is None:
            if jax.process_index() == 0:
                _remove_unfinished(self.directory)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("attnjax.checkpoint.open")
            self._retention.load(self.directory)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                atomicity_options=ocp.options.AtomicityOptions(
                    mode=ocp.options.AtomicityMode.COMMIT_FILE
                ),
                lightweight_initialize=True,
                save_root_metadata=False,
            )
            self._manager = self._write(
                lambda: ocp.CheckpointManager(epath.Path(self.directory), options=options)
            )
        return self._manager

    def _write(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except Exception as error:
            # Storage layers raise their own types; what the user can act on is the path.
            reason = _first_line(error)
            raise AttnjaxError(f"cannot write checkpoints to {self.directory}: {reason}") from error

    def _set_aside(self, refused: Mapping[int, str], used: int) -> None:
        """Rename damaged steps, so that the run can save these steps again, and say so once."""
        if not refused:
            return
        if jax.process_index() == 0:
            for step in refused:
                _rename_away(self.directory / str(step), "damaged")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("attnjax.checkpoint.set_aside")
        reasons = "; ".join(f"step {step}: {problem}" for step, problem in refused.items())
        self._say(
            f"warning: damaged checkpoint refused and renamed to <step>.damaged, "
            f"continuing from step {used} instead ({reasons})"
        )

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            self._on_message(text)


def latest_step(directory: str | os.PathLike) -> int | None:
    """Return the newest complete step in a folder, or None; its contents are not checked."""
    return next(iter(_steps(pathlib.Path(directory))), None)


def complete_steps(directory: str | os.PathLike) -> list[int]:
    """Return all complete steps in a folder, newest first; their contents are not checked.

    With several processes, every process calls this and gets what process 0 sees.
    """
    return list(_agreed_steps(pathlib.Path(directory).absolute()))


def require_fit(directory: str | os.PathLike, target: Any) -> None:
    """Refuse a folder whose newest readable step is of another program; reads no array.

    Args:
      directory: folder of the steps; it may be missing.
      target: as in `Checkpointer.restore`.

    Raises:
      RecipeError: structure, shapes or dtypes differ; up to ten are listed.
    """
    directory = pathlib.Path(directory).absolute()
    for step in _steps(directory):
        try:
            body = _read_run(directory / str(step), step)
        except Damaged:
            continue
        _require_match(directory / str(step), body["arrays"], target)
        return


def restore_params(
    directory: str | os.PathLike,
    target: Params,
    prefixes: Sequence[str] = ("ema", "params"),
    step: int | None = None,
) -> tuple[Params, int]:
    """Restore parameters only, without optimiser state; the folder is not changed.

    Args:
      directory: folder of the steps.
      target: tree of `jax.ShapeDtypeStruct`s that carry shardings, or of arrays.
      prefixes: top-level names in order of preference; the first one that was saved is taken.
      step: a particular step; the newest sound one by default.

    Returns:
      The parameters and the step they come from.

    Raises:
      RecipeError: the saved parameters do not fit the target.
      NoUsableCheckpoint: no such step, or all of them are damaged.
    """
    directory = pathlib.Path(directory).absolute()
    problems = []
    for candidate in _agreed_steps(directory):
        if step is not None and candidate != step:
            continue
        folder = directory / str(candidate)
        body, problem = _agree(lambda: _read_run(folder, candidate))
        if problem is None:
            saved = {path.partition("/")[0] for path in body["arrays"]}
            prefix = next((p for p in prefixes if p in saved), prefixes[-1])
            wanted = {prefix: target}
            part = {p: d for p, d in body["arrays"].items() if p.startswith(f"{prefix}/")}
            _require_match(folder, part, wanted)
            state, problem = _read_state(folder, body, wanted)
            if problem is None:
                return state[prefix], candidate
        problems.append(f"step {candidate}: {problem}")
        _log.warning("%s is damaged: %s", folder, problem)
    what = "checkpoint" if step is None else f"step {step}"
    reasons = f": {'; '.join(problems)}" if problems else ""
    raise NoUsableCheckpoint(f"no usable {what} in {directory}{reasons}")


class _Retention:
    """Orbax preservation policy: the newest `keep` steps and the best one."""

    def __init__(self, keep: int, best: str):
        self._keep, self._best = keep, best
        self._values: dict[int, float] = {}

    def observe(self, step: int, metrics: Mapping[str, float] | None) -> None:
        value = (metrics or {}).get(self._best) if self._best else None
        if value is not None and np.isfinite(value):
            self._values[step] = float(value)

    def load(self, directory: pathlib.Path) -> None:
        """Read the metrics of steps that an earlier process saved."""
        for step in _steps(directory) if self._best else ():
            try:
                self.observe(step, _read_run(directory / str(step), step)["metrics"])
            except Damaged as error:
                _log.warning("%s: %s", directory / str(step), error)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = sorted(info.step for info in checkpoints)
        kept = set(steps[-self._keep :])
        known = [step for step in steps if step in self._values]
        if known:
            kept.add(max(known, key=lambda step: (self._values[step], step)))
        return [info.step in kept for info in checkpoints]


def _steps(directory: pathlib.Path) -> list[int]:
    """List complete steps, newest first: canonical decimal folders that hold a commit file."""
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir()]
    steps = [int(name) for name in names if name.isdecimal() and name == str(int(name))]
    return sorted((s for s in steps if (directory / str(s) / _COMMIT_FILE).is_file()), reverse=True)


def _unfinished_steps(directory: pathlib.Path) -> list[int]:
    """List steps whose save started and never finished, newest first."""
    names = [entry.name for entry in directory.iterdir() if entry.is_dir() and any(entry.iterdir())]
    steps = {int(name) for name in names if name.isdecimal() and name == str(int(name))}
    return sorted(steps - set(_steps(directory)), reverse=True)


def _agreed_steps(directory: pathlib.Path) -> Iterator[int]:
    """Yield complete steps, newest first, as process 0 sees them."""
    steps = _steps(directory)
    if jax.process_count() == 1:
        yield from steps
        return
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.zeros(count, np.int32)
    padded[: min(count, len(steps))] = steps[:count]
    yield from (int(step) for step in multihost_utils.broadcast_one_to_all(padded))


def _agree(action: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """Run an action on every process; return its result, or the problem if any process had one."""
    result, problem = None, None
    try:
        result = action()
    except Damaged as error:
        problem = str(error)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(problem is not None))
        if np.any(failed) and problem is None:
            problem = f"unreadable on process {int(np.argmax(failed))}"
    return (result, None) if problem is None else (None, problem)


def _read_run(folder: pathlib.Path, step: int) -> dict[str, Any]:
    file = folder / _RUN / _RUN_FILE
    try:
        body = integrity.unseal(file.read_bytes())
    except (OSError, Damaged) as error:
        raise Damaged(f"{file}: {error}") from error
    if body.get("step") != step:
        raise Damaged(f"{file} belongs to step {body.get('step')}")
    return body


def _require_match(folder: pathlib.Path, saved: Mapping[str, str], target: Any) -> None:
    wanted = {p: integrity.describe(x) for p, x in integrity.flatten(target).items()}
    lines = integrity.compare(saved, wanted)
    if lines:
        more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise RecipeError(f"{folder} does not fit this recipe: {'; '.join(lines[:_LISTED])}{more}")


def _read_state(
    folder: pathlib.Path, body: Mapping[str, Any], target: Any
) -> tuple[Any, str | None]:
    """Read the arrays that the target names; return them, or what is wrong with the saved ones."""
    wanted = {p: _key_data_target(x) for p, x in integrity.flatten(target).items()}
    arrays, problem = _agree(lambda: _read_arrays(folder / _STATE, wanted))
    if problem is not None:
        return None, problem
    sums = integrity.checksums(arrays)
    wrong = [path for path in wanted if sums[path] != body["checksums"][path]]
    if wrong:
        return None, f"checksum of {', '.join(wrong[:_LISTED])} in {folder / _STATE} differs"
    leaves = [
        _wrap_key(arrays[path], like) if integrity.is_key(like) else arrays[path]
        for path, like in integrity.flatten(target).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), None


def _read_arrays(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Read arrays by path; only this process takes part, so that it may fail alone.

    Raises:
      Damaged: an array is missing, unreadable or of another shape or dtype.
    """
    tree = _nest(wanted)
    arguments = ocp.args.PyTreeRestore(
        tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
    )
    try:
        restored = ocp.PyTreeCheckpointHandler().restore(epath.Path(folder), args=arguments)
    except Exception as error:
        # Decoders of damaged files raise whatever they stumble over.
        raise Damaged(f"{folder} is unreadable: {_first_line(error)}") from error
    arrays = integrity.flatten(restored)
    for path, like in wanted.items():
        if not isinstance(arrays.get(path), jax.Array):
            raise Damaged(f"{path} is missing in {folder}")
        if integrity.describe(arrays[path]) != integrity.describe(like):
            raise Damaged(f"{path} in {folder} reads as {integrity.describe(arrays[path])}")
    return arrays


def _key_data_target(leaf: Any) -> jax.ShapeDtypeStruct:
    shape, dtype = leaf.shape, leaf.dtype
    if integrity.is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
        shape, dtype = data.shape, data.dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)


def _wrap_key(data: jax.Array, like: Any) -> jax.Array:
    implementations = []
    # Only arrays and tracers tell their key type.
    jax.eval_shape(lambda key: implementations.append(jax.random.key_impl(key)), like)
    wrap = jax.jit(
        lambda x: jax.random.wrap_key_data(x, impl=implementations[0]),
        out_shardings=like.sharding,
    )
    return wrap(data)


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {"a/b": x} into {"a": {"b": x}}, so that files do not depend on the tree's classes."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _remove_unfinished(directory: pathlib.Path) -> None:
    """Clear what would collide with a save: rests of interrupted ones go, foreign things move."""
    for entry in list(directory.iterdir()):
        if not entry.name.isdecimal() or entry.name != str(int(entry.name)):
            continue
        if not entry.is_dir():
            _rename_away(entry, "foreign")
        elif not (entry / _COMMIT_FILE).exists():
            if {child.name for child in entry.iterdir()} <= _ORBAX_FILES:
                shutil.rmtree(entry, ignore_errors=True)
            else:
                _rename_away(entry, "foreign")


def _rename_away(path: pathlib.Path, suffix: str) -> None:
    destination = path.with_name(f"{path.name}.{suffix}")
    if destination.exists():
        destination = path.with_name(f"{path.name}.{suffix}.{time.time_ns()}")
    path.rename(destination)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
