# SPDX-License-Identifier: Apache-2.0
"""Measure speed: python -m launch.benchmark --suite=attention --out=DIR
or --suite=long_context --out=DIR, or --suite=training --config=FILE [--peer=timm]

attention: implementations and installed peers in turns; results.csv (resumable) and results.png.
long_context: LongCA-bench, kernels and context-parallel attentions; likewise, and its own tables.
With --tune: tile sizes of our implementations in turns; tuning.json, see attnjax/ops/tuning.py.
training: a recipe's step and forward pass, its data pipeline, and a peer in turns.
Progress goes to stderr, a table to stdout.
"""

import importlib
import json
import pathlib
import sys

from absl import flags

from attnjax.errors import RecipeError
from launch import command

GRIDS = {
    "attention": "attnjax.benchmarks.attention",
    "long_context": "attnjax.benchmarks.long_context.suite",
}
SUITES = (*GRIDS, "training")
CONFIG = command.define_config()
SUITE = flags.DEFINE_string("suite", None, "What to measure: " + ", ".join(SUITES) + ".")
SHAPES = flags.DEFINE_string("shapes", "standard", "Name of a grid, such as quick or standard.")
ONLY = flags.DEFINE_string("only", "", "Pattern of cells, such as chunked/causal/.*")
PEER = flags.DEFINE_string("peer", "", "training: also measure the model in this library (timm).")
DATA = flags.DEFINE_bool("data", True, "training: also measure the data pipeline alone.")
SECONDS = flags.DEFINE_float("seconds", 10.0, "Time for each comparison.")
OUT = flags.DEFINE_string("out", "", "Folder; training: JSON-lines file to append to.")
TUNE = flags.DEFINE_bool("tune", False, "attention: find the fastest tiles instead.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List the cells, measure nothing.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Virtual CPU devices; 0: leave as it is.")


def main() -> None:
    from attnjax import registry

    if SUITE.value not in SUITES:
        raise RecipeError(f"--suite={SUITE.value}: {registry.nearest(SUITE.value or '', SUITES)}")
    training() if SUITE.value == "training" else cells()


def cells() -> None:
    """Run a suite of cells."""
    from attnjax.benchmarks import tune as tuner

    suite = importlib.import_module(GRIDS[SUITE.value])
    if TUNE.value and SUITE.value != "attention":
        raise RecipeError("--tune belongs to --suite=attention")
    try:
        cases = suite.grid(SHAPES.value, ONLY.value)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if DRY_RUN.value:
        print("\n".join(suite.names(cases)))
        return
    if not OUT.value:
        raise RecipeError("--out is missing: the folder for the files of results")
    folder = pathlib.Path(OUT.value)
    table = command.writable(str(folder / ("tuning.json" if TUNE.value else "results.csv")))
    command.start_devices("", 0, -1, CPU_DEVICES.value)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    if TUNE.value:
        print(tuner.render(tuner.tune(cases, table, budget=SECONDS.value, say=say), table))
        return
    rows = suite.run(cases, table, budget=SECONDS.value, say=say)
    suite.draw(rows, table.with_suffix(".png"))
    print(suite.render(rows))


def training() -> None:
    """Run the training suite."""
    recipe = CONFIG.value
    if not recipe.model:
        from attnjax.recipe import available

        raise RecipeError("--config is missing; recipes: " + ", ".join(available()))
    recipe.validate()
    out = command.writable(OUT.value)
    command.start_devices("", 0, -1, CPU_DEVICES.value)
    from attnjax.train.throughput import measure, render

    record = measure(recipe, peer=PEER.value, with_data=DATA.value, seconds=SECONDS.value)
    if out:
        with out.open("a") as file:
            file.write(json.dumps({"suite": "training", **record}) + "\n")
    print(render(record))


if __name__ == "__main__":
    command.run(main)
