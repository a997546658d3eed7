# SPDX-License-Identifier: Apache-2.0
"""Compile a training step for TPUs without having one: python -m launch.compile --config=FILE
--topology=v5p:4x4x4

Prints memory per device, whether it fits, collectives and operations. Needs the extra `tpu-aot`.
"""

import json
import os
import pathlib

from absl import flags

from attnjax.errors import RecipeError
from launch import command

CONFIG = command.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5p:4x4x4, v5e:16x16 or v6e:4x4.")
BATCH = flags.DEFINE_integer("batch", 0, "Global batch; 0: the recipe's.")
JSON = flags.DEFINE_string("json", None, "File for the same numbers as JSON.")


def main() -> int:
    recipe = CONFIG.value
    if not recipe.model:
        from attnjax.recipe import available

        raise RecipeError("--config is missing; recipes: " + ", ".join(available()))
    if not TOPOLOGY.value:
        raise RecipeError("--topology is missing, such as v5p:4x4x4")
    if BATCH.value:
        recipe.batch = BATCH.value
    recipe.validate()
    # This machine's own devices are not wanted, and libtpu would look for a TPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from attnjax.train.ahead_of_time import compile_step, render

    compiled = compile_step(recipe, TOPOLOGY.value)
    if JSON.value:
        try:
            pathlib.Path(JSON.value).write_text(json.dumps(compiled.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise RecipeError(f"--json={JSON.value} cannot be written: {error}") from error
    print(render(compiled))
    return 0


if __name__ == "__main__":
    command.run(main)
