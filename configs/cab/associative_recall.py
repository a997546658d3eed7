# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with a known answer: four pairs are told, and asked for 16 tokens later.

One layer, so that what an attention does not see is not seen. The best accuracy is 1, chance 1/4.
Variants: the name of an attention; "local" sees 16 tokens, which end just behind the pairs.

Run:     python -m launch.train --config=configs/cab/associative_recall.py --workdir=DIR
         --config.model.attention=s4d
Data:    generated, no network
Cost:    about 20 seconds on two CPU cores
Expect:  EXPECT
"""

from attnjax.errors import RecipeError
from attnjax.ops.efficient import ATTENTIONS
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

ATTENTION = {
    **{name: name for name, family in ATTENTIONS.items() if "causal_self" in family.patterns},
    "local": {"name": "local", "window": 16},
    "long_short": {"name": "long_short", "window": 16, "chunk": 4, "memory": 32},
}


def get_config(variant: str = "") -> Recipe:
    variant = variant or "softmax"
    if variant not in ATTENTION:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, ATTENTION)}")
    source = {"name": "associative_recall", "keys": 4, "values": 4, "distance": 16}
    return Recipe(
        seed=0,
        steps=300,
        batch=64,
        model={
            "name": "gpt2",
            "vocab_size": 26,
            "length": 28,
            "width": 64,
            "depth": 1,
            "num_heads": 4,
            "hidden": 128,
            "attention": ATTENTION[variant],
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        task={"name": "language", "scored": True},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=5e-3, warmup=40, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=300, keep=1),
        report=Report(every=100, samples=0),
    )
