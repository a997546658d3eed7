# SPDX-License-Identifier: Apache-2.0
"""Train a recipe: python -m launch.train --config=configs/<slug>/<recipe>.py --workdir=DIR

Run again with the same folder to continue. Exit codes: 0 done, 2 bad recipe, 3 preempted,
4 no usable checkpoint, 5 diverged, 1 anything else.
"""

from absl import flags

from attnjax.errors import RecipeError
from launch import command

CONFIG = command.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; created when missing.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything, print the plan, write nothing.")
RESUME = flags.DEFINE_enum(
    "resume", "auto", ["auto", "force", "never"], "What to do with a run that the folder holds."
)
COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0; empty: detect.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", 0, "Number of processes; 0: detect.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Index of this process; -1: detect.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Virtual CPU devices; 0: leave as it is.")
HANG_TIMEOUT = flags.DEFINE_float(
    "hang_timeout", 0.0, "Exit with all stacks after this many seconds without progress; 0: never."
)


def main() -> None:
    if not CONFIG.value.model:
        from attnjax import recipe

        raise RecipeError("--config is missing; recipes: " + ", ".join(recipe.available()))
    if not WORKDIR.value and not DRY_RUN.value:
        raise RecipeError("--workdir is missing")
    CONFIG.value.validate()
    command.start_devices(
        COORDINATOR.value, PROCESS_COUNT.value, PROCESS_ID.value, CPU_DEVICES.value
    )
    from attnjax.train.loop import run

    run(
        CONFIG.value,
        WORKDIR.value or "",
        resume=RESUME.value,
        dry_run=DRY_RUN.value,
        hang_timeout=HANG_TIMEOUT.value,
    )


if __name__ == "__main__":
    command.run(main)
