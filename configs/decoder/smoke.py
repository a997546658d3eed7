# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of the decoder: text of a Markov chain, down to its known entropy.

Every letter depends on the two before it: the entropy rate is 1.206 nats, and 1.922 is the best
that a model can do which looks at one letter, without attention.

Run:     python -m launch.train --config=configs/decoder/smoke.py --workdir=runs/decoder-smoke
Data:    generated, no network
Cost:    about a minute on two CPU cores
Expect:  test/loss below 1.27
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "markov_text", "length": 64, "symbols": 8, "order": 2}
    return Recipe(
        seed=0,
        steps=400,
        batch=32,
        model={
            "name": "decoder",
            "vocab_size": 256,
            "length": 64,
            "width": 64,
            "depth": 2,
            "heads": (4, 2),
            "hidden": 256,
        },
        task={"name": "language", "z_loss": 1e-4, "logits_chunk": 32},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=5e-3, warmup=20, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=100, keep=1),
        report=Report(every=20, samples=0),
    )
