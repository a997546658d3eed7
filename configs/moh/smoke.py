# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of MoH-ViT: three quarters of the heads at work, on the digits.

Run:     python -m launch.train --config=configs/moh/smoke.py --workdir=DIR
Data:    bundled with scikit-learn, no network
Cost:    about a minute on two CPU cores        Expect: it ends; accuracy is above chance
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    scale = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    view = {"name": "image_eval", "size": 64, "crop_ratio": 1.0, **scale}
    return Recipe(
        seed=0,
        steps=60,
        batch=32,
        model={
            "name": "moh",
            "num_classes": 10,
            "image_size": 64,
            "widths": (16, 16, 32, 32),
            "num_heads": (2, 2, 4, 4),
            "depths": (1, 1, 1, 1),
            "ratios": (2, 2, 2, 2),
            "shared": (2, 2, 1, 1),
            "chosen": (0, 0, 2, 2),
        },
        task={"name": "classification"},
        data=Data(source={"name": "digits", "split": "train"}, pipeline=view),
        optim=Optim(lr=2e-3, warmup=10, weight_decay=0.05),
        evals={
            "test": Evaluation(data=Data(source={"name": "digits", "split": "test"}, pipeline=view))
        },
        checkpoint=Checkpoint(every=30),
        report=Report(every=20, samples=2),
    )
