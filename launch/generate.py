# SPDX-License-Identifier: Apache-2.0
"""Let a trained language model write: python -m launch.generate --workdir=DIR --prompt='def '

Likeliest tokens by default; --temperature=0.8 [--top_k=40] [--top_p=0.95] [--seed=1] draws.
"""

from absl import flags

from attnjax.errors import RecipeError
from launch import command

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of a training run.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
TOKENS = flags.DEFINE_integer("tokens", 200, "Most tokens to write.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token; else draw.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among so many of the likeliest; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest that have this share.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Virtual CPU devices; 0: leave as it is.")


def main() -> None:
    if not PROMPT.value:
        raise RecipeError("--prompt is missing")
    recipe = command.recorded(WORKDIR.value)
    command.start_devices("", 0, -1, CPU_DEVICES.value)
    import jax

    from attnjax.train.language_scorer import of_recipe

    model, params, mesh = command.trained(recipe, WORKDIR.value)
    with jax.set_mesh(mesh):
        scorer = of_recipe(recipe, model, params)
        try:
            texts = scorer.write(
                PROMPT.value,
                TOKENS.value,
                temperature=TEMPERATURE.value,
                top_k=TOP_K.value,
                top_p=TOP_P.value,
                key=jax.random.key(SEED.value),
            )
        except ValueError as error:
            raise RecipeError(str(error)) from error
    for prompt, text in zip(PROMPT.value, texts, strict=True):
        print(f"{prompt}{text}\n")


if __name__ == "__main__":
    command.run(main)
