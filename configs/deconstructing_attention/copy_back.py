# SPDX-License-Identifier: Apache-2.0
"""Repeat the token eight places before: a map that depends on the places alone suffices.

Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602, ask which principles of
attention are needed. Copying needs mixing and nothing else: the answer is always in the same place.
Chance is 1/16. Variants are the mixers of all layers.

Run:     python -m launch.train --config=configs/deconstructing_attention/copy_back.py:mlp
         --workdir=DIR
Data:    generated, no network
Cost:    a minute on one CPU core
Expect:  test/accuracy above 0.9 with maps of a constant sequence, 0.06 with mlp
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = (
    "random_embedding",
    "standard",
    "mlp",
    "approximate",
    "non_approximate",
    "fixed_sequence",
    "static_embedding",
)


def get_config(variant: str = "") -> Recipe:
    variant = variant or "random_embedding"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "copy_back", "length": 32, "distance": 8, "symbols": 16}
    return Recipe(
        seed=0,
        steps=300,
        batch=64,
        model={
            "name": "deconstructing_attention",
            "vocab_size": 17,
            "length": 32,
            "width": 64,
            "depth": 2,
            "heads": (4, 4),
            "hidden": 128,
            "mixer": variant,
            "rope_base": 100.0,
        },
        task={"name": "language", "scored": True},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=3e-3, warmup=20, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=300, keep=1),
        report=Report(every=40, samples=0),
    )
