# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of landmark attention: Markov text, also read at twice the length.

Run:     python -m launch.train --config=configs/landmark/smoke.py --workdir=DIR
Data:    generated, no network
Cost:    about a minute on two CPU cores
Expect:  test/loss and long/loss below 1.4; the source's entropy is 1.206
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "markov_text", "length": 64, "symbols": 8, "order": 2}
    test = {**source, "split": "test", "size": 128}
    return Recipe(
        seed=0,
        steps=300,
        batch=32,
        model={"name": "landmark", "length": 64, "block": 7, "width": 64, "hidden": 128},
        task={"name": "long_language", "chunk": 28, "blocks": 8},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=5e-3, warmup=20, clip=1.0),
        evals={
            "test": Evaluation(data=Data(source=test)),
            "long": Evaluation(data=Data(source={**test, "length": 128})),
        },
        checkpoint=Checkpoint(every=100, keep=1),
        report=Report(every=20, samples=0),
    )
