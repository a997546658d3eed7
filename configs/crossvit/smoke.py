# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of CrossViT: training, evaluation, checkpoint and report on the digits.

Run:     python -m launch.train --config=configs/crossvit/smoke.py --workdir=runs/crossvit-smoke
Data:    bundled with scikit-learn, no network
Cost:    under a minute on two CPU cores        Expect: it ends; accuracy is above chance
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    scale = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    view = {"name": "image_eval", "size": 48, "crop_ratio": 1.0, **scale}
    return Recipe(
        seed=0,
        steps=60,
        batch=32,
        model={
            "name": "crossvit",
            "num_classes": 10,
            "image_size": (48, 48),
            "dims": (32, 64),
            "depth": ((1, 1, 0),),
            "num_heads": (4, 4),
            "mlp_ratio": (2.0, 2.0),
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
