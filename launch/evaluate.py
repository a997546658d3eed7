# SPDX-License-Identifier: Apache-2.0
"""Evaluate a run's newest good checkpoint: python -m launch.evaluate --workdir=DIR

The mean of its last five: python -m launch.evaluate --workdir=DIR --last=5
Beside an n-gram of the same text: --ngram=5. Questions of multiple choice: --choices=FILE.jsonl
Pretrained weights: python -m launch.evaluate --config=FILE --config.model.weights=X.safetensors
The last line on stdout is a JSON object of metrics.
"""

import json
import pathlib

from absl import flags

from attnjax.errors import RecipeError
from launch import command

CONFIG = command.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of a training run.")
AVERAGED = flags.DEFINE_bool("averaged", True, "Use the moving average of parameters if kept.")
LAST = flags.DEFINE_integer("last", 1, "Checkpoints of the run whose parameters are averaged.")
NGRAM = flags.DEFINE_integer("ngram", 0, "Also evaluate an n-gram of this order; 0: none.")
CHOICES = flags.DEFINE_string("choices", "", "Also answer these questions of multiple choice.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Virtual CPU devices; 0: leave as it is.")


def main() -> None:
    recipe = CONFIG.value
    if not recipe.model:
        recipe = command.recorded(WORKDIR.value)
    elif not WORKDIR.value and not recipe.model.get("weights"):
        raise RecipeError("give a --workdir or --config.model.weights: new weights know nothing")
    recipe.validate()
    if not recipe.evals:
        raise RecipeError("the recipe has no evals")
    command.start_devices("", 0, -1, CPU_DEVICES.value)
    import dataclasses

    import jax

    from attnjax.parallel import make_mesh
    from attnjax.train.average import average_params
    from attnjax.train.evaluate import evaluate, scalars
    from attnjax.train.inputs import check_evals
    from attnjax.train.program import build

    program = build(recipe, make_mesh(dataclasses.asdict(recipe.mesh)))
    check_evals(program)
    with jax.set_mesh(program.mesh):
        step = 0
        if WORKDIR.value:
            prefixes = ("ema", "params") if AVERAGED.value else ("params",)
            folder = pathlib.Path(WORKDIR.value) / "checkpoints"
            params, steps = average_params(folder, program.state.params, LAST.value, prefixes)
            step = steps[0]
        else:
            params = program.init().params
        results = {"step": step}
        for name, evaluation in recipe.evals.items():
            values = scalars(evaluate(program, params, evaluation))
            results.update({f"{name}/{key}": value for key, value in values.items()})
        if CHOICES.value:
            from attnjax.train.language_scorer import answer

            results |= answer(recipe, program.task.model, params, CHOICES.value)
    if NGRAM.value:
        from attnjax.train.text_baseline import ngram_bits

        found = ngram_bits(recipe, NGRAM.value)
        results |= {f"{name}/ngram_bits_per_token": bits for name, bits in found.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    command.run(main)
