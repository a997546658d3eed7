# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run: a hybrid of a constant random map and attention on text of a Markov chain.

Every letter depends on the two before it: the entropy rate is 1.206 nats, and 1.922 is the best
that a model can do which looks at one letter, as the MLP mixer does.

Run:     python -m launch.train --config=configs/deconstructing_attention/smoke.py --workdir=DIR
Data:    generated, no network
Cost:    about a minute on two CPU cores
Expect:  test/loss below 1.3
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "markov_text", "length": 64, "symbols": 8, "order": 2}
    return Recipe(
        seed=0,
        steps=300,
        batch=32,
        model={
            "name": "deconstructing_attention",
            "vocab_size": 256,
            "length": 64,
            "width": 64,
            "depth": 2,
            "heads": (4, 4),
            "hidden": 128,
            "mixer": "random_embedding",
            "layout": "hybrid",
            "rope_base": 10_000.0,
        },
        task={"name": "language", "logits_chunk": 32},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=5e-3, warmup=20, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=100, keep=1),
        report=Report(every=20, samples=0),
    )
