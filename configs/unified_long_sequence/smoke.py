# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of the sequence model: digits as 64 pixels, a few steps of each part.

Run:     python -m launch.train --config=configs/unified_long_sequence/smoke.py --workdir=DIR
Data:    bundled with scikit-learn, no network
Cost:    half a minute on two CPU cores        Expect: it ends; accuracy is above chance
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    return Recipe(
        seed=0,
        steps=100,
        batch=32,
        model={
            "name": "sequence_mixer",
            "length": 64,
            "num_classes": 10,
            "dim": 32,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "mixer": "convolution",
            "bias": "learnt",
        },
        task={"name": "classification"},
        data=Data(source={"name": "digit_sequences", "split": "train"}),
        optim=Optim(lr=3e-3, warmup=10, weight_decay=0.05),
        evals={"test": Evaluation(data=Data(source={"name": "digit_sequences", "split": "test"}))},
        checkpoint=Checkpoint(every=50),
        report=Report(every=20, samples=0),
    )
