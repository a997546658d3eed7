# SPDX-License-Identifier: Apache-2.0
"""Convert weights between this library and PyTorch layouts: python -m launch.convert --system=SLUG
--preset=NAME --input=FILE --output=FILE [--to=attnjax|timm|...]

The input is a safetensors file in any layout the system knows, or a PyTorch checkpoint together
with --allow_torch_pickle. The output is always a safetensors file.
"""

from absl import flags

from attnjax.errors import RecipeError
from launch import command

SYSTEM = flags.DEFINE_string("system", None, "Slug of the model, such as crossvit.")
PRESET = flags.DEFINE_string("preset", None, "Preset of the model; default: its own defaults.")
SET = flags.DEFINE_multi_string("set", [], "Field of the model, such as num_classes=10.")
INPUT = flags.DEFINE_string("input", None, "File to read.")
OUTPUT = flags.DEFINE_string("output", None, "Safetensors file to write.")
TO = flags.DEFINE_string("to", "attnjax", "Layout to write: attnjax, or one of the system's own.")
RESIZE = flags.DEFINE_bool("resize_positions", False, "Fit position tables of another image size.")
PICKLE = flags.DEFINE_bool(
    "allow_torch_pickle", False, "Read a PyTorch checkpoint with torch.load(weights_only=True)."
)
BASE = flags.DEFINE_string("base", "", "File to which the input is a difference, as published.")


def main() -> None:
    for flag in (SYSTEM, INPUT, OUTPUT):
        if not flag.value:
            raise RecipeError(f"--{flag.name} is missing")
    import jax

    # Conversion is a matter of memory; accelerators are not needed.
    jax.config.update("jax_platforms", "cpu")
    from attnjax.models.convert import convert

    report = convert(
        SYSTEM.value,
        PRESET.value,
        command.settings(SET.value),
        source=INPUT.value,
        target=OUTPUT.value,
        layout=TO.value,
        resize_positions=RESIZE.value,
        allow_torch_pickle=PICKLE.value,
        base=BASE.value,
    )
    print(report)


if __name__ == "__main__":
    command.run(main)
