# SPDX-License-Identifier: Apache-2.0
"""Noncausal self-attention with a known answer: tokens whose answers stand 8 places away.

One layer, so that what an attention does not see is not seen. The best accuracy is 1, chance 1/8.
Variants: the name of an attention, "local_short" (7 neighbours on either side, one too few) and
"local" (8, just enough).

Run:     python -m launch.train --config=configs/cab/window_permutation.py --workdir=DIR
         --config.model.attention=performer
Data:    generated, no network
Cost:    about 20 seconds on two CPU cores
Expect:  test/accuracy 1.0 with softmax and local, 0.12 with local_short, 0.14 with performer,
         measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

DISTANCE = 8
ATTENTION = {
    **{
        name: name
        for name in (
            "abc",
            "cosformer",
            "lara",
            "long_short",
            "nystrom",
            "performer",
            "prob_sparse",
            "s4d",
            "softmax",
        )
    },
    "local": {"name": "local", "window": DISTANCE},
    "local_short": {"name": "local", "window": DISTANCE - 1},
}


def get_config(variant: str = "") -> Recipe:
    variant = variant or "softmax"
    if variant not in ATTENTION:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, ATTENTION)}")
    source = {"name": "window_permutation", "length": 64, "distance": DISTANCE, "symbols": 8}
    return Recipe(
        seed=0,
        steps=400,
        batch=64,
        model={
            "name": "encoder",
            "family": "bert",
            "vocab_size": 9,
            "length": 64,
            "width": 64,
            "depth": 1,
            "num_heads": 4,
            "hidden": 128,
            "attention": ATTENTION[variant],
            "dropout": 0.0,
        },
        task={"name": "masked_language"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=5e-3, warmup=40, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=400, keep=1),
        report=Report(every=100, samples=0),
    )
