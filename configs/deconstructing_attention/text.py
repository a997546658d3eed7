# SPDX-License-Identifier: Apache-2.0
"""The next byte of Python's own handbook, by a small decoder with relaxed mixers.

Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602, order the mixers by
perplexity: standard, hybrids, uniform approximate and constant maps, MLP. This is their comparison
at a size for two CPU cores. Variants are the mixers of all layers; "hybrid" has the constant random
map in odd layers only. Other hybrids: --config.model.layout=hybrid.

Run:     python -m launch.train --config=configs/deconstructing_attention/text.py:hybrid
         --workdir=DIR
Data:    ships with Python
Cost:    under a minute on one CPU core
Expect:  test/perplexity (of a byte) below 7 with standard and hybrid, about 11.5 with mlp, which
         knows pairs of bytes alone
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = (
    "standard",
    "hybrid",
    "mlp",
    "approximate",
    "non_approximate",
    "random_embedding",
    "fixed_sequence",
    "static_embedding",
)

FIXED = (
    "Attention weighs what has been said by what is said now. A fixed sentence, such as this one, "
    "can lend its queries and keys to all other texts."
)
"""Bytes of the fixed sequence."""


def get_config(variant: str = "") -> Recipe:
    variant = variant or "standard"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "stdlib_text", "length": 128}
    model = {
        "name": "deconstructing_attention",
        "vocab_size": 256,
        "length": 128,
        "width": 64,
        "depth": 2,
        "heads": (4, 4),
        "hidden": 128,
        "mixer": "random_embedding" if variant == "hybrid" else variant,
        "layout": "hybrid" if variant == "hybrid" else "uniform",
        "family": "qwen3",
        "rope_base": 1000.0,
    }
    if variant == "approximate":
        model["options"] = {"norm": "joint", "second": "full"}
    if variant == "fixed_sequence":
        model["options"] = {"tokens": tuple(FIXED.encode())}
    return Recipe(
        seed=0,
        steps=300,
        batch=16,
        model=model,
        task={"name": "language"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=4e-3, warmup=40, clip=1.0, weight_decay=0.1),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}))},
        checkpoint=Checkpoint(every=300, keep=1),
        report=Report(every=40, samples=0),
    )
