# SPDX-License-Identifier: Apache-2.0
"""Say whether most bits so far were ones: a running mean suffices, places do not matter.

Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602: the non-approximate mixer
has no pairs of a query and a key, and gives a token the same weight for all that come later. It can
count. Chance is about one half. Variants are the mixers of all layers.

Run:     python -m launch.train --config=configs/deconstructing_attention/prefix_count.py
         --workdir=DIR
Data:    generated, no network
Cost:    a minute on one CPU core
Expect:  test/accuracy above 0.9 with non_approximate, about 0.54 with mlp
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = (
    "non_approximate",
    "standard",
    "mlp",
    "approximate",
    "random_embedding",
    "fixed_sequence",
    "static_embedding",
)


def get_config(variant: str = "") -> Recipe:
    variant = variant or "non_approximate"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "prefix_count", "blocks": 4, "bits": 7}
    return Recipe(
        seed=0,
        steps=300,
        batch=64,
        model={
            "name": "deconstructing_attention",
            "vocab_size": 6,
            "length": 36,
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
        checkpoint=Checkpoint(every=400, keep=1),
        report=Report(every=40, samples=0),
    )
