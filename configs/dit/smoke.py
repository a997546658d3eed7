# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of DiT: digits of a class, a few seconds of training, samples in ten steps.

Run:     python -m launch.train --config=configs/dit/smoke.py --workdir=DIR
Data:    bundled with scikit-learn, no network; 1,437 images of 8 x 8
Cost:    about half a minute on two CPU cores
Expect:  test/noise_error below 0.4; samples are not good yet
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    data = lambda split: Data(
        source={"name": "digits", "split": split}, pipeline={"name": "pictures"}
    )
    return Recipe(
        seed=0,
        steps=150,
        batch=32,
        model={
            "name": "dit",
            "num_classes": 10,
            "image_size": 8,
            "channels": 1,
            "width": 32,
            "depth": 2,
            "num_heads": 4,
        },
        task={"name": "class_diffusion", "sample_steps": 10, "judge": True},
        data=data("train"),
        optim=Optim(name="adamw", lr=3e-3, decay="constant", clip=1.0, ema=0.95),
        evals={"test": Evaluation(data=data("test"), batch=120)},
        checkpoint=Checkpoint(every=100, keep=1),
        report=Report(every=20, samples=0),
    )
