# SPDX-License-Identifier: Apache-2.0
"""What the launchers share: the `--config` flag and one-line errors with documented exit codes."""

import logging
import os
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from attnjax import recipe as recipe_lib
from attnjax.errors import FAILED, AttnjaxError, RecipeError


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
        sys.stdout.flush()
        _leave(code or 0)

    app.run(guarded, flags_parser=_parse)


def _start_logging() -> None:
    # Libraries that log through absl keep to warnings; our own lines are the ones to read.
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("attnjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


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
    # A failed peer would block the shutdown barrier of jax.distributed; skip it, as the outcome of
    # this process is already known and everything it wrote is flushed.
    jax = sys.modules.get("jax")
    if code not in (0, RecipeError.exit_code) and jax and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or FAILED)
    sys.exit(code)


def start_devices(coordinator: str, process_count: int, process_id: int, cpu_devices: int) -> None:
    """Set the number of virtual CPU devices, switch on the compilation cache, join the processes.

    Args:
      coordinator, process_count, process_id: see `attnjax.parallel.process.initialise`.
      cpu_devices: virtual CPU devices of this process; 0 leaves the default.
    """
    import jax

    from attnjax.parallel.process import initialise

    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    initialise(coordinator, process_count, process_id)
