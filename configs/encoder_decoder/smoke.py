# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of encoder and decoder: short sequences, written backwards.

Run:     python -m launch.train --config=configs/encoder_decoder/smoke.py
         --workdir=runs/encoder-decoder-smoke
Data:    generated, no network
Cost:    half a minute on two CPU cores
Expect:  test/accuracy above 0.99; 1 measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "copy_sort", "order": "reverse", "length": 7, "symbols": 13}
    return Recipe(
        seed=0,
        steps=400,
        batch=64,
        model={
            "name": "encoder_decoder",
            "vocab_size": 16,
            "lengths": (7, 8),
            "width": 64,
            "depth": (1, 1),
            "num_heads": 4,
            "hidden": 128,
            "dropout": 0.0,
        },
        task={"name": "sequence_to_sequence"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=3e-3, warmup=40, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=100, keep=1),
        report=Report(every=20, samples=0),
    )
