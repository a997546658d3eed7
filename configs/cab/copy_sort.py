# SPDX-License-Identifier: Apache-2.0
"""Causal cross-attention with a known answer: write a source again, as it is, backwards or sorted.

CAB (arXiv 2210.07661) calls a decoder's attention to its source causal cross. Here the source tells
everything, so that accuracy shows how well an attention finds one place among many; nothing is left
to guess, and the best accuracy is 1. Variants: copy, reverse, sort.

Run:     python -m launch.train --config=configs/cab/copy_sort.py:sort --workdir=DIR
         --config.model.cross_attention=softmax
Data:    generated, no network
Cost:    about a minute on two CPU cores
Expect:  test/accuracy above 0.99 with softmax; copy 1, sort 0.9997 measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("copy", "reverse", "sort")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "copy"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "copy_sort", "order": variant, "length": 16, "symbols": 16}
    return Recipe(
        seed=0,
        steps=500,
        batch=64,
        model={
            "name": "encoder_decoder",
            "vocab_size": 19,
            "lengths": (16, 17),
            "width": 64,
            "depth": (2, 2),
            "num_heads": 4,
            "hidden": 128,
            "encoder_attention": "softmax",
            "decoder_attention": "softmax",
            "cross_attention": "softmax",
            "dropout": 0.0,
        },
        task={"name": "sequence_to_sequence"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=2e-3, warmup=80, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 512}))},
        checkpoint=Checkpoint(every=400, keep=1),
        report=Report(every=40, samples=0),
    )
