# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of the vision transformer: training and evaluation on the digits.

Variants: softmax, or another attention in its place; --config.model.attention takes any name.

Run:     python -m launch.train --config=configs/vit/smoke.py --workdir=runs/vit-smoke
Data:    bundled with scikit-learn, no network
Cost:    under a minute on two CPU cores        Expect: it ends; accuracy is above chance
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("softmax", "local", "long_short", "s4d")


def get_config(variant: str = "") -> Recipe:
    attention = variant or "softmax"
    if attention not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    scale = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    view = {"name": "image_eval", "size": 32, "crop_ratio": 1.0, **scale}
    return Recipe(
        seed=0,
        steps=200,
        batch=32,
        model={
            "name": "vit",
            "num_classes": 10,
            "image_size": 32,
            "patch_size": 8,
            "width": 64,
            "depth": 2,
            "num_heads": 4,
            "hidden": 128,
            "attention": attention,
        },
        task={"name": "classification"},
        data=Data(source={"name": "digits", "split": "train"}, pipeline=view),
        optim=Optim(lr=3e-3, warmup=20, weight_decay=0.05),
        evals={
            "test": Evaluation(data=Data(source={"name": "digits", "split": "test"}, pipeline=view))
        },
        checkpoint=Checkpoint(every=100),
        report=Report(every=20, samples=2),
    )
