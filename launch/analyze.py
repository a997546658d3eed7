# SPDX-License-Identifier: Apache-2.0
"""Measure what a system found: python -m launch.analyze --system=SLUG --measure=NAME --out=DIR
[--workdir=RUN] [--set=name=value ...]

Measures of trained networks read the newest good checkpoint of --workdir; the others need no run.
DIR gets NAME.json, .md, .csv, .npz and pictures; the report is printed.
"""

import importlib
import inspect

from absl import flags

from attnjax import registry
from attnjax.errors import RecipeError
from attnjax.recipe import check_arguments
from launch import command

SYSTEM = flags.DEFINE_string("system", None, "Slug of a system of kind analysis.")
MEASURE = flags.DEFINE_string("measure", None, "What to measure; a wrong name lists them.")
SET = flags.DEFINE_multi_string("set", [], "Option of the measure, such as heads=4.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of a training run.")
OUT = flags.DEFINE_string("out", "", "Folder of the report.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Virtual CPU devices; 0: leave as it is.")

GIVEN = ("params", "source")
"""What measures of trained networks get from the run."""


def main() -> None:
    known = [slug for slug, system in registry.SYSTEMS.items() if system.kind == "analysis"]
    if SYSTEM.value not in known:
        raise RecipeError(f"--system={SYSTEM.value}: {registry.nearest(SYSTEM.value or '', known)}")
    measures = importlib.import_module(registry.system(SYSTEM.value).module).MEASURES
    if MEASURE.value not in measures:
        choices = registry.nearest(MEASURE.value or "", measures)
        raise RecipeError(f"--measure={MEASURE.value}: {choices}")
    measure, options = measures[MEASURE.value], command.settings(SET.value)
    needs_run = GIVEN[0] in inspect.signature(measure).parameters
    check_arguments(measure, options, f"measure {MEASURE.value}", GIVEN)
    if needs_run and not WORKDIR.value:
        raise RecipeError(f"--workdir is missing: measure {MEASURE.value} reads a trained network")
    path = command.writable(OUT.value, f"{MEASURE.value}.json")
    command.start_devices("", 0, -1, CPU_DEVICES.value)
    report = measure(*(of_run() if needs_run else ()), **options)
    report.write(path.parent, MEASURE.value)
    print(report.to_markdown())


def of_run():
    """Return parameters and data source of the run."""
    import jax

    recipe = command.recorded(WORKDIR.value)
    _, params, _ = command.trained(recipe, WORKDIR.value)
    return jax.device_get(params), recipe.data.source


if __name__ == "__main__":
    command.run(main)
