# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits read pixel by pixel; the variant is a mixer, then options.

Mixers: softmax, kernel, linformer, nystrom, window, favor, fnet, gfnet, mlp, convolution, s4d, lru.
Options: enlarged (32 x 32 = 1,024 steps instead of 8 x 8 = 64).

Run:     python -m launch.train --config=configs/unified_long_sequence/digits.py:s4d,enlarged
         --workdir=DIR
Data:    bundled with scikit-learn, no network; 1,437 images train, 360 test
Cost:    minutes on two CPU cores for 64 steps (not measured for 1,024)
Expect:  test/accuracy far above chance (0.1); not measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("softmax", "kernel", "linformer", "nystrom", "window", "favor", "fnet", "gfnet", "mlp",
            "convolution", "s4d", "lru")  # fmt: skip
OPTIONS = ("enlarged",)


def get_config(variant: str = "") -> Recipe:
    mixer, *options = (variant or "softmax").split(",")
    if mixer not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(mixer, VARIANTS)}")
    for option in options:
        if option not in OPTIONS:
            raise RecipeError(f"unknown option {option!r}: {nearest(option, OPTIONS)}")
    steps = 1_024 if "enlarged" in options else 64
    source = {"name": "digit_sequences", "steps": steps}
    return Recipe(
        seed=0,
        steps=1_000,
        batch=64,
        model={
            "name": "sequence_mixer",
            "length": steps,
            "num_classes": 10,
            "dim": 64,
            "depth": 3,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "mixer": mixer,
            "mixer_options": {},
            "bias": "learnt",
        },
        task={"name": "classification"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=2e-3, warmup=50, weight_decay=0.05, no_decay=("random_projection$",)),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}), every=250)},
        checkpoint=Checkpoint(every=250, keep=2, best="test/accuracy"),
        report=Report(every=50, samples=0),
    )
