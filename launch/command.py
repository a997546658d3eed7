# SPDX-License-Identifier: Apache-2.0
"""What the launchers share: the `--config` flag and one-line errors with documented exit codes."""

import ast
import contextlib
import json
import logging
import os
import pathlib
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from attnjax import recipe as recipe_lib
from attnjax.errors import FAILED, AttnjaxError, RecipeError

_PARTING = 10.0
"""Seconds that a failed process waits for the others to end as well."""


def define_config(flag_values=flags.FLAGS):
    """Define `--config=FILE[:VARIANT]` and its overrides `--config.optim.lr=1e-3`."""
    return config_flags.DEFINE_config_dataclass(
        "config",
        recipe_lib.Recipe(),
        "Recipe file with an optional variant, such as configs/crossvit/digits.py:none; fields are "
        "overridden by name, such as --config.optim.lr=1e-3 or --config.mesh.fsdp=4.",
        flag_values=flag_values,
        parse_fn=lambda text: recipe_lib.open_overrides(recipe_lib.load(text), sys.argv),
    )


def run(main: Callable[[], int | None]) -> None:
    """Parse the flags, run `main`, and exit with the code of its outcome.

    Args:
      main: takes nothing, returns an exit code or None for 0. Expected failures (`AttnjaxError`)
        end in one line on stderr and their own exit code; anything else shows its traceback.
    """
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "2")

    def guarded(_):
        _start_logging()
        try:
            code = main()
        except AttnjaxError as error:
            _fail(str(error), error.exit_code)
        except Exception:
            traceback.print_exc()
            _leave(FAILED)
        _leave(code or 0)

    app.run(guarded, flags_parser=_parse)


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of `--set=NAME=VALUE` flags; what is no Python literal is text.

    Raises:
      RecipeError: one has no equals sign.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise RecipeError(f"--set={text}: expected name=value")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _start_logging() -> None:
    # Libraries that log through absl keep to warnings; our own lines are the ones to read.
    absl_logging.set_verbosity(absl_logging.WARNING)
    _silence_failed_saves()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("attnjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _silence_failed_saves() -> None:
    # A save that fails reaches the user as one line. Storage layers add pages of tracebacks, for
    # each array whose write failed or was given up, some of them after that line.
    absl_logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _show_unraisable


def _show_unraisable(failure) -> None:
    # Writes that were still under way when a save failed find the event loop of that save closed.
    if str(failure.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(failure)


def _parse(argv):
    try:
        return flags.FLAGS(argv)
    except AttnjaxError as error:
        _fail(str(error), error.exit_code)
    except flags.Error as error:
        _fail(str(error), RecipeError.exit_code)
    except (KeyError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        message = error.args[0] if error.args else error
        _fail(
            f"{type(error).__name__} in the command line or config: {message}",
            RecipeError.exit_code,
        )


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _leave(code)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    jax = sys.modules.get("jax")
    if code and jax and jax.distributed.is_initialized():
        # Processes that end together take leave of one another, or the loss of the first would
        # abort the others. A process that fails alone must not wait for those that still run.
        parting = threading.Thread(target=_shut_down, args=(jax,), daemon=True)
        parting.start()
        parting.join(_PARTING)
        os._exit(code)
    sys.exit(code)


def _shut_down(jax) -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


def say(line: str) -> None:
    """Tell about progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def recorded(workdir: str | None) -> recipe_lib.Recipe:
    """Return the recipe of a run directory.

    Raises:
      RecipeError: there is none, or it cannot be read.
    """
    record = pathlib.Path(workdir or "") / "recipe.json"
    if not workdir or not record.is_file():
        raise RecipeError(f"give --config or a --workdir with recipe.json (got {record})")
    try:
        return recipe_lib.Recipe.from_json(record.read_text())
    except (RecipeError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{record} cannot be read: {error}") from error


def trained(recipe: recipe_lib.Recipe, workdir: str | pathlib.Path):
    """Return model, parameters of the newest good checkpoint, and mesh of a run."""
    import dataclasses

    import jax

    from attnjax.parallel import make_mesh
    from attnjax.train.average import average_params
    from attnjax.train.program import build

    program = build(recipe, make_mesh(dataclasses.asdict(recipe.mesh)))
    with jax.set_mesh(program.mesh):
        folder = pathlib.Path(workdir) / "checkpoints"
        params, _ = average_params(folder, program.state.params, 1, ("ema", "params"))
    return program.task.model, params, program.mesh


def writable(out: str, name: str = "") -> pathlib.Path | None:
    """Return a file of results after checking that it can be appended to.

    Args:
      out: a folder, or the file itself if no name is given; may then be empty.
      name: of the file in that folder.

    Returns:
      The file; None if neither is given.

    Raises:
      RecipeError: the folder is missing, or the file cannot be written.
    """
    if not out and name:
        raise RecipeError("--out is missing: the folder for the files of results")
    if not out:
        return None
    path = pathlib.Path(out, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise RecipeError(f"--out: {path} cannot be written: {error}") from error
    return path


def append(path: pathlib.Path | None, record: dict) -> None:
    """Append a record to a JSON-lines file, if there is one."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def start_devices(coordinator: str, process_count: int, process_id: int, cpu_devices: int) -> None:
    """Set the number of virtual CPU devices and join the processes.

    Args:
      coordinator, process_count, process_id: see `attnjax.parallel.process.initialise`.
      cpu_devices: virtual CPU devices of this process; 0 leaves the default.
    """
    import jax

    from attnjax.parallel.process import initialise

    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    initialise(coordinator, process_count, process_id)
