# SPDX-License-Identifier: Apache-2.0
"""Measure speed: python -m launch.benchmark --suite=attention|cab|long_context|mixers|scale_factor
--out=DIR, or --suite=training --config=FILE [--peer=timm]

attention: implementations and installed peers in turns; results.csv (resumable) and results.png;
with --tune: tile sizes; tuning.json, see attnjax/ops/tuning.py.
cab: attentions trained on CAB's tasks, leaderboard.md; or cost, --shapes=ladder. long_context:
LongCA-bench, kernels and context-parallel attentions. mixers: token mixers over length; with
--config: the recipe trained over context. scale_factor: what tiling and devices each do.
training: a recipe's step and forward pass, its data pipeline, and a peer in turns."""

import importlib

from absl import flags

from attnjax.benchmarks import SUITES as CELLS
from attnjax.errors import RecipeError
from attnjax.recipe import available
from launch import command

SUITES = (*CELLS, "training")
CONFIG = command.define_config()
SUITE = flags.DEFINE_string("suite", None, "What to measure: " + ", ".join(SUITES) + ".")
SHAPES = flags.DEFINE_string("shapes", "standard", "Name of a grid, such as quick or standard.")
ONLY = flags.DEFINE_string("only", "", "Pattern of cells, such as chunked/causal/.*")
PEER = flags.DEFINE_string("peer", "", "training: also measure the model in timm or transformers.")
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
    if TUNE.value and SUITE.value != "attention":
        raise RecipeError(f"--tune: suite {SUITE.value} has no tiles")
    if SUITE.value == "training":
        training()
    elif SUITE.value == "mixers" and CONFIG.value.model:
        contexts()
    else:
        cells(importlib.import_module(CELLS[SUITE.value]))


def cells(suite) -> None:
    """Run a suite of cells."""
    try:
        cases = suite.grid(SHAPES.value, ONLY.value)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if DRY_RUN.value:
        print("\n".join(suite.names(cases)))
        return
    table = start("tuning.json" if TUNE.value else "results.csv")
    if TUNE.value:
        tuner = importlib.import_module("attnjax.benchmarks.tune")
        print(tuner.render(tuner.tune(cases, table, budget=SECONDS.value, say=command.say), table))
        return
    rows = suite.run(cases, table, budget=SECONDS.value, say=command.say)
    suite.draw(rows, table.with_suffix(".png"))
    print(suite.render(rows))


def contexts() -> None:
    """Train a recipe over lengths of context."""
    recipe = CONFIG.value.validate()
    table = start("context.jsonl")
    sweep = importlib.import_module("attnjax.train.context_sweep")
    records = sweep.run(recipe, SHAPES.value, table, seconds=SECONDS.value, say=command.say)
    sweep.draw(records, table.with_suffix(".png"))
    print(sweep.render(records))


def training() -> None:
    """Run the training suite."""
    if not CONFIG.value.model:
        raise RecipeError("--config is missing; recipes: " + ", ".join(available()))
    recipe = CONFIG.value.validate()
    out = start("")
    from attnjax.train.throughput import measure, render

    record = measure(recipe, peer=PEER.value, with_data=DATA.value, seconds=SECONDS.value)
    command.append(out, {"suite": "training", **record})
    print(render(record))


def start(name: str):
    """Return the file of results in --out (or --out itself), and start the devices."""
    path = command.writable(OUT.value, name)
    command.start_devices("", 0, -1, CPU_DEVICES.value)
    return path


if __name__ == "__main__":
    command.run(main)
