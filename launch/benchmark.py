# SPDX-License-Identifier: Apache-2.0
"""Measure speed: python -m launch.benchmark --suite=training --config=FILE [--peer=timm]

Suites: training (a recipe's step and forward pass, its data pipeline, and a peer in turns).
Progress goes to stderr, a table to stdout; --out appends the numbers as one JSON line.
"""

import json
import pathlib

from absl import flags

from attnjax.errors import RecipeError
from launch import command

SUITES = ("training",)
CONFIG = command.define_config()
SUITE = flags.DEFINE_string("suite", None, "What to measure: " + ", ".join(SUITES) + ".")
PEER = flags.DEFINE_string("peer", "", "training: also measure the model in this library (timm).")
DATA = flags.DEFINE_bool("data", True, "training: also measure the data pipeline alone.")
SECONDS = flags.DEFINE_float("seconds", 60.0, "Time for each comparison.")
OUT = flags.DEFINE_string("out", "", "JSON-lines file to append to.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Virtual CPU devices; 0: leave as it is.")


def main() -> None:
    from attnjax import registry

    if SUITE.value not in SUITES:
        raise RecipeError(f"--suite={SUITE.value}: {registry.nearest(SUITE.value or '', SUITES)}")
    recipe = CONFIG.value
    if not recipe.model:
        from attnjax.recipe import available

        raise RecipeError("--config is missing; recipes: " + ", ".join(available()))
    recipe.validate()
    out = _writable(OUT.value)
    command.start_devices("", 0, -1, CPU_DEVICES.value)
    from attnjax.train.throughput import measure, render

    record = measure(recipe, peer=PEER.value, with_data=DATA.value, seconds=SECONDS.value)
    if out:
        with out.open("a") as file:
            file.write(json.dumps({"suite": SUITE.value, **record}) + "\n")
    print(render(record))


def _writable(path):
    if not path:
        return None
    try:
        pathlib.Path(path).open("a").close()
    except OSError as error:
        raise RecipeError(f"--out={path} cannot be written: {error}") from error
    return pathlib.Path(path)


if __name__ == "__main__":
    command.run(main)
