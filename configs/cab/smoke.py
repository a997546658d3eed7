# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of CAB: a permutation within a window, by local attention.

Run:     python -m launch.train --config=configs/cab/smoke.py --workdir=DIR
Data:    generated, no network
Cost:    ten seconds on two CPU cores        Expect: it ends; accuracy is above chance, 1/4
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "window_permutation", "length": 16, "distance": 2, "symbols": 4}
    return Recipe(
        seed=0,
        steps=100,
        batch=32,
        model={
            "name": "encoder",
            "vocab_size": 5,
            "length": 16,
            "width": 32,
            "depth": 1,
            "num_heads": 2,
            "hidden": 32,
            "attention": {"name": "local", "window": 2},
            "dropout": 0.0,
        },
        task={"name": "masked_language"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=1e-2, warmup=10, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 256}))},
        checkpoint=Checkpoint(every=50, keep=1),
        report=Report(every=20, samples=0),
    )
