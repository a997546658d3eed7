# SPDX-License-Identifier: Apache-2.0
"""Complete pairs told before: a map of attention must depend on the tokens, in one layer at least.

Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602: relaxed layers between
standard ones do nearly as well as standard ones everywhere. Here one layer has to look one place
back, for which a map that no token changes suffices, and a later one has to look for a token, for
which it does not; there is a third, with which training finds this from any initial values. Who
knows the tokens that complete, but not which completes which, is right once in four. Variants:
standard; hybrid, a constant random map in odd layers; uniform, constant random maps in all of them.

Run:     python -m launch.train --config=configs/deconstructing_attention/induction.py:hybrid
         --workdir=DIR
Data:    generated, no network
Cost:    half a minute on one CPU core
Expect:  test/accuracy above 0.95 with standard and hybrid, below 0.3 with uniform
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("hybrid", "standard", "uniform")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "hybrid"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "induction", "pairs": 4, "asks": 12, "firsts": 8, "seconds": 8}
    return Recipe(
        seed=0,
        steps=600,
        batch=64,
        model={
            "name": "deconstructing_attention",
            "vocab_size": 17,
            "length": 36,
            "width": 32,
            "depth": 3,
            "heads": (2, 2),
            "hidden": 64,
            "mixer": "standard" if variant == "standard" else "random_embedding",
            "layout": "hybrid" if variant == "hybrid" else "uniform",
            "family": "qwen3",
            "rope_base": 100.0,
        },
        task={"name": "language", "scored": True},
        data=Data(source={**source, "split": "train", "echoes": True}),
        optim=Optim(lr=5e-3, warmup=50, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=600, keep=1),
        report=Report(every=40, samples=0),
    )
