# SPDX-License-Identifier: Apache-2.0
"""One run as one value: a typed spine whose leaves are plain dicts of constructor arguments.

A config file defines `get_config(variant="") -> Recipe`. Launchers override fields by name
(`--config.optim.lr=1e-3`), `validate` refuses what cannot work before anything is compiled, and the
run directory keeps the recipe as JSON. This module imports no JAX, so that `--help` stays quick.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import pathlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attnjax import registry
from attnjax.errors import RecipeError

_FLAX_FIELDS = ("name", "parent")
"""Fields that every Linen module has and no recipe sets."""


@dataclasses.dataclass
class Data:
    """Where examples come from and what happens to each before batching.

    Attributes:
      source: `name` in `registry.SOURCES` plus that class's arguments.
      pipeline: `name` in `registry.PIPELINES` plus that class's arguments.
      workers: preprocessing processes; 0 preprocesses in threads of this process.
      prefetch: batches prepared ahead, per worker.
      repeats: repeated augmentation: copies of each example inside an epoch (1 switches it off).
    """

    source: dict = dataclasses.field(default_factory=dict)
    pipeline: dict = dataclasses.field(default_factory=lambda: {"name": "arrays"})
    workers: int = 0
    prefetch: int = 2
    repeats: int = 1


@dataclasses.dataclass
class Optim:
    """Optimiser, schedule and averaging. Steps are optimiser steps.

    Attributes:
      name: `adamw`, `sgd`, `lion` or `adafactor`.
      lr: peak learning rate.
      warmup: steps of linear warm-up from `warmup_lr`.
      warmup_lr: learning rate of step 0.
      decay: `cosine`, `linear`, `inverse_sqrt`, `step` or `constant`.
      end_lr: learning rate reached at `steps - cooldown` and kept for the cool-down; of the decay
        `step`, the lowest one.
      cooldown: last steps at `end_lr`; below 0: the run ends so many steps before the decay does.
      decay_every, decay_rate: of the decay `step`: after every so many steps the learning rate is
        multiplied by the rate.
      weight_decay: decoupled decay, for parameters that no pattern of `no_decay` matches.
      no_decay: patterns (`re.search`) on parameter paths; tensors of rank 0 and 1 are never decayed
        when `decay_vectors` is off.
      decay_vectors: decay biases and norm scales too.
      clip: global-norm clipping; 0 switches it off.
      accumulate: microbatches per optimiser step.
      ema: decay of the exponential moving average of parameters; 0 switches it off.
      beta1, beta2, eps, momentum: as in the optimiser's paper.
    """

    name: str = "adamw"
    lr: float = 1e-3
    warmup: int = 0
    warmup_lr: float = 0.0
    decay: str = "cosine"
    end_lr: float = 0.0
    cooldown: int = 0
    decay_every: int = 0
    decay_rate: float = 0.5
    weight_decay: float = 0.0
    no_decay: tuple = ()
    decay_vectors: bool = False
    clip: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9


@dataclasses.dataclass
class Mesh:
    """Sizes of the four mesh axes; one of them may be -1 (whatever devices are left)."""

    data: int = -1
    fsdp: int = 1
    model: int = 1
    context: int = 1


@dataclasses.dataclass
class Evaluation:
    """One held-out set: its data, how often it is evaluated (0: only at the end), its batch size.

    `batch=0` takes the training batch size.
    """

    data: Data = dataclasses.field(default_factory=Data)
    every: int = 0
    batch: int = 0


@dataclasses.dataclass
class Checkpoint:
    """Saving: every so many steps, how many of the newest to keep, and which metric marks the best.

    `best="val/accuracy"` also keeps the step with the highest value of that metric.
    """

    every: int = 1000
    keep: int = 2
    best: str = ""


@dataclasses.dataclass
class Guard:
    """What happens at a bad step: the update is skipped and the example ids are recorded.

    Attributes:
      skip: skip updates whose loss or gradient is not finite.
      patience: consecutive bad steps after which the run stops (exit code 5).
      spike_sigma: also skip losses this many standard deviations above their running mean; 0: off.
    """

    skip: bool = True
    patience: int = 3
    spike_sigma: float = 0.0


@dataclasses.dataclass
class Report:
    """What a run tells: log interval, TensorBoard files, profiler window, pictures at the end.

    Attributes:
      every: steps between log lines and metric records.
      tensorboard: write event files next to metrics.jsonl.
      profile_start: first profiled step; -1: no profile.
      profile_steps: length of the profiler window.
      samples: examples shown with their attention maps in the final report; 0: none.
    """

    every: int = 50
    tensorboard: bool = True
    profile_start: int = -1
    profile_steps: int = 3
    samples: int = 6


@dataclasses.dataclass
class Recipe:
    """Everything that defines a run.

    Attributes:
      seed: the only source of randomness: initialisation, data order, dropout.
      steps: optimiser steps.
      batch: examples per optimiser step, over all devices and processes.
      model: `name` (a slug of kind model), `preset`, optional `weights`, overrides of its fields.
      task: `name` in `registry.TASKS` plus that class's arguments.
      data, optim, mesh, evals, checkpoint, guard, report: see their classes.
    """

    seed: int = 0
    steps: int = 1000
    batch: int = 64
    model: dict = dataclasses.field(default_factory=dict)
    task: dict = dataclasses.field(default_factory=dict)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    evals: dict = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    guard: Guard = dataclasses.field(default_factory=Guard)
    report: Report = dataclasses.field(default_factory=Report)

    def validate(self) -> "Recipe":
        """Check types, ranges, names and constructor arguments; return the recipe itself.

        Raises:
          RecipeError: names the field, the value and the valid choices.
        """
        _check_types(self, "")
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.batch >= 1, "batch", self.batch, "at least 1")
        optim = self.optim
        _choice("optim.name", optim.name, ("adamw", "sgd", "lion", "adafactor"))
        decays = ("cosine", "linear", "inverse_sqrt", "step", "constant")
        _choice("optim.decay", optim.decay, decays)
        _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
        if optim.decay == "step":
            every, rate = optim.decay_every, optim.decay_rate
            _require(every >= 1, "optim.decay_every", every, "at least 1 for the decay 'step'")
            _require(0 < rate <= 1, "optim.decay_rate", rate, "in (0, 1]")
            _require(optim.cooldown == 0, "optim.cooldown", optim.cooldown, "0: steps go on")
        _require(optim.accumulate >= 1, "optim.accumulate", optim.accumulate, "at least 1")
        _require(0 <= optim.ema < 1, "optim.ema", optim.ema, "in [0, 1)")
        for field in ("clip", "weight_decay", "warmup", "warmup_lr", "end_lr", "eps"):
            _require(getattr(optim, field) >= 0, f"optim.{field}", getattr(optim, field), ">= 0")
        for field in ("beta1", "beta2", "momentum"):
            value = getattr(optim, field)
            _require(0 <= value < 1, f"optim.{field}", value, "in [0, 1)")
        _require(
            optim.warmup + optim.cooldown <= self.steps,
            "optim.warmup + optim.cooldown",
            optim.warmup + optim.cooldown,
            f"at most steps ({self.steps})",
        )
        for pattern in optim.no_decay:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise RecipeError(f"optim.no_decay: {pattern!r} is no pattern: {error}") from error
        _require(
            self.batch % optim.accumulate == 0,
            "batch",
            self.batch,
            f"a multiple of optim.accumulate ({optim.accumulate})",
        )
        sizes = dataclasses.asdict(self.mesh)
        for axis, size in sizes.items():
            _require(
                size == -1 or size >= 1, f"mesh.{axis}", size, "at least 1, or -1 for the rest"
            )
        _require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "at most one axis of -1")
        _require(
            self.checkpoint.every >= 1, "checkpoint.every", self.checkpoint.every, "at least 1"
        )
        _require(self.checkpoint.keep >= 1, "checkpoint.keep", self.checkpoint.keep, "at least 1")
        guard, report = self.guard, self.report
        _require(guard.patience >= 1, "guard.patience", guard.patience, "at least 1")
        _require(guard.spike_sigma >= 0, "guard.spike_sigma", guard.spike_sigma, "at least 0")
        _require(report.every >= 1, "report.every", report.every, "at least 1")
        _require(report.samples >= 0, "report.samples", report.samples, "at least 0")
        for name, evaluation in self.evals.items():
            for field in ("every", "batch"):
                value = getattr(evaluation, field)
                _require(value >= 0, f"evals.{name}.{field}", value, "at least 0")
        best_eval = self.checkpoint.best.partition("/")[0]
        if best_eval and best_eval not in self.evals:
            raise RecipeError(
                f"checkpoint.best={self.checkpoint.best!r} is no evaluation: "
                f"{registry.nearest(best_eval, self.evals)}"
            )
        self._check_leaf("model", self.model, "model", reserved=("preset", "weights"))
        self._check_leaf("task", self.task, "task", given=("model",))
        for where, data in self._all_data():
            self._check_leaf(f"{where}.source", data.source, "source")
            self._check_leaf(f"{where}.pipeline", data.pipeline, "pipeline")
            _require(data.workers >= 0, f"{where}.workers", data.workers, "at least 0")
            _require(data.prefetch >= 1, f"{where}.prefetch", data.prefetch, "at least 1")
            _require(data.repeats >= 1, f"{where}.repeats", data.repeats, "at least 1")
        return self

    def _all_data(self):
        yield "data", self.data
        for name, evaluation in self.evals.items():
            yield f"evals.{name}.data", evaluation.data

    def _check_leaf(self, where, leaf, table, reserved=(), given=()):
        if "name" not in leaf:
            known = registry.nearest("", registry.TABLES[table])
            raise RecipeError(f"{where}.name is missing {known}")
        target = registry.resolve(table, leaf["name"])
        if table == "model" and leaf.get("preset"):
            presets = inspect.getmodule(target).PRESETS
            if leaf["preset"] not in presets:
                raise RecipeError(
                    f"{where}.preset: unknown preset {leaf['preset']!r} of {leaf['name']}: "
                    f"{registry.nearest(leaf['preset'], presets)}"
                )
        arguments = {k: v for k, v in leaf.items() if k not in ("name", *reserved)}
        check_arguments(target, arguments, where, given=given)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts; tuples become lists."""
        return _plain(dataclasses.asdict(self))

    def to_json(self) -> str:
        """Return the recipe as indented JSON, readable by `from_json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from nested dicts; unknown keys and wrong types raise RecipeError."""
        return _build(cls, values, "")

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Parse what `to_json` wrote.

        Raises:
          RecipeError: the text is no JSON object, or has unknown keys or wrong types.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"recipe is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"recipe must be a JSON object, not {type(values).__name__}")
        return cls.from_dict(values)

    def identity(self) -> dict[str, Any]:
        """Return the part of the recipe that decides the numbers a run computes.

        Mesh, worker counts, checkpointing, reporting and evaluation may differ between a run and
        its continuation; everything else may not.
        """
        values = self.to_dict()
        for free in ("mesh", "checkpoint", "report", "evals"):
            del values[free]
        for free in ("workers", "prefetch"):
            del values["data"][free]
        return values

    def digest(self) -> str:
        """Return a short hash of `identity`, equal for runs that compute the same numbers."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the leaves in which two nested dicts differ, as "path: left != right"."""
    lines = []
    for key in sorted({*a, *b}):
        left, right = a.get(key, "(absent)"), b.get(key, "(absent)")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r} != {right!r}")
    return lines


def check_arguments(target: Callable, arguments: Mapping[str, Any], where: str, given=()) -> None:
    """Check keyword arguments against a constructor before calling it.

    Args:
      target: class or function to be called.
      arguments: its keyword arguments.
      where: name of the recipe field, for messages.
      given: parameters that the caller provides itself.

    Raises:
      RecipeError: an argument is unknown (with the nearest known one), missing, or of another type
        than the parameter's simple annotation or default.
    """
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in (*_FLAX_FIELDS, *given)]
    known += ["name"] if "name" in arguments and "name" in parameters else []
    for name, value in arguments.items():
        if name not in known:
            raise RecipeError(f"{where}.{name}: unknown; {registry.nearest(name, known)}")
        parameter = parameters[name]
        expected = type(parameter.default) if parameter.annotation is parameter.empty else None
        if parameter.annotation in (bool, int, float, str, tuple, dict):
            expected = parameter.annotation
        if expected in (bool, int, float, str, tuple, dict) and not _matches(value, expected):
            raise RecipeError(
                f"{where}.{name}={value!r} is {_type(value)}, expected {expected.__name__}"
            )
    for name in known:
        parameter = parameters[name]
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and name not in arguments and not variadic:
            raise RecipeError(f"{where}.{name} is required by {target.__name__}")


def find(path: str) -> pathlib.Path:
    """Locate a config file: as given, or among the recipes that ship with the package.

    Args:
      path: such as "configs/crossvit/digits.py", without a variant.

    Returns:
      The existing file.

    Raises:
      RecipeError: there is no such file; the message lists the recipes that exist.
    """
    candidate = pathlib.Path(path)
    if candidate.is_file():
        return candidate
    relative = pathlib.PurePath(path)
    if relative.parts[:1] == ("configs",):
        shipped = folder().joinpath(*relative.parts[1:])
        if shipped.is_file():
            return shipped
    raise RecipeError(f"no config file {path!r}: {registry.nearest(path, available())}")


def folder() -> pathlib.Path:
    """Return the folder of shipped recipes: beside the package in a clone, else inside it."""
    package = pathlib.Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def available() -> list[str]:
    """List the shipped recipes as "configs/<slug>/<recipe>.py"."""
    files = sorted(folder().glob("*/*.py"))
    return ["configs/" + f.relative_to(folder()).as_posix() for f in files if f.stem != "claim"]


def execute(path: str) -> Any:
    """Run a config file the user named and return it as a module.

    Raises:
      RecipeError: no such file, no Python file, or an error in it (its line is named).
    """
    file = find(path)
    if file.suffix != ".py":
        raise RecipeError(f"config file {path!r} is no Python file")
    spec = importlib.util.spec_from_file_location(f"attnjax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with _naming_line(file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _naming_line(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [0])[-1]
        raise RecipeError(f"{file}:{line}: {_type(error)}: {error}") from error


def load(path_and_variant: str) -> Recipe:
    """Run a config file, such as "configs/crossvit/digits.py:none", and return its recipe.

    Raises:
      RecipeError: no such file, no `get_config`, or it refuses the variant.
    """
    path, _, variant = path_and_variant.partition(":")
    module = execute(path)
    if not hasattr(module, "get_config"):
        raise RecipeError(f"{path} defines no get_config(variant)")
    with _naming_line(find(path)):
        recipe = module.get_config(variant)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path}: get_config returned {_type(recipe)}, expected a Recipe")
    return copy.deepcopy(recipe)


def open_overrides(recipe: Recipe, arguments: Sequence[str]) -> Recipe:
    """Make constructor arguments that the config leaves out available for overriding.

    Flags can only override what exists, so `--config.model.dtype=bfloat16` needs the model's own
    default in place first.

    Args:
      recipe: the recipe as its config file made it; changed in place.
      arguments: the command line.

    Returns:
      The recipe.

    Raises:
      RecipeError: an override names no field and no constructor argument.
    """
    for argument in arguments:
        match = re.match(r"--?config\.([\w.]+)(=|$)", argument)
        if match:
            _open_path(recipe, match.group(1).split("."), match.group(1))
    return recipe


def _open_path(node, keys, path):
    *parents, last = keys
    for key in parents:
        known = node if isinstance(node, dict) else vars(node)
        if key not in known:
            raise RecipeError(f"{path}: unknown; {registry.nearest(key, known)}")
        node = known[key]
    if not isinstance(node, dict):
        if not hasattr(node, "__dict__") or last not in vars(node):
            raise RecipeError(f"{path}: unknown; {registry.nearest(last, vars(node))}")
        return
    table = parents[-1] if parents else ""
    if last in node or table not in registry.TABLES or "name" not in node:
        return
    parameters = inspect.signature(registry.resolve(table, node["name"])).parameters
    known = [name for name in parameters if name not in _FLAX_FIELDS]
    known += ["preset", "weights"] if table == "model" else []
    if last not in known:
        raise RecipeError(f"{path}: unknown; {registry.nearest(last, known)}")
    default = parameters[last].default if last in parameters else ""
    node[last] = "" if default is None or default is inspect.Parameter.empty else default


def _require(condition, field, value, expectation):
    if not condition:
        raise RecipeError(f"{field}={value!r}: must be {expectation}")


def _choice(field, value, choices):
    if value not in choices:
        raise RecipeError(f"{field}={value!r}: {registry.nearest(value, choices)}")


def _type(value) -> str:
    return type(value).__name__


def _matches(value, expected) -> bool:
    if value is None or expected is type(None):
        return True
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected is tuple:
        return isinstance(value, (tuple, list))
    return isinstance(value, expected)


def _check_types(node, prefix):
    for field in dataclasses.fields(node):
        value, where = getattr(node, field.name), f"{prefix}{field.name}"
        if value is None or not _matches(value, field.type):
            expected = field.type.__name__
            raise RecipeError(f"{where}={value!r} is {_type(value)}, expected {expected}")
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{where}.")
    if isinstance(node, Recipe):
        for name, evaluation in node.evals.items():
            if not isinstance(evaluation, Evaluation):
                raise RecipeError(f"evals.{name} is {_type(evaluation)}, expected Evaluation")
            _check_types(evaluation, f"evals.{name}.")


def _plain(value):
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    raise RecipeError(f"{value!r} ({_type(value)}) cannot be written to recipe.json")


def _build(cls, values, prefix):
    if not isinstance(values, Mapping):
        raise RecipeError(f"{prefix or 'recipe'} is {_type(values)}, expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise RecipeError(f"{prefix}{key}: unknown; {registry.nearest(key, fields)}")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            value = _build(kind, value, f"{prefix}{key}.")
        elif cls is Recipe and key == "evals":
            value = {n: _build(Evaluation, v, f"evals.{n}.") for n, v in value.items()}
        elif kind is tuple and isinstance(value, list):
            value = tuple(value)
        arguments[key] = value
    return cls(**arguments)
