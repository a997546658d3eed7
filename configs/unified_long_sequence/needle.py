# SPDX-License-Identifier: Apache-2.0
"""One marked value, 1, 2, 4, ... or 32 positions before the query: which context is enough?

The model sees the last 4, 8, 16, 32 or 64 of 64 tokens (the variant: context_4 ... context_64). A
marked value out of sight leaves a guess among four, so that the best accuracy is (hits + misses /
4) / 6: 0.5, 0.625, 0.75, 0.875 and 1.

Run:     python -m launch.train --config=configs/unified_long_sequence/needle.py:context_16
         --workdir=DIR
         python -m launch.benchmark --suite=mixers --shapes=quick --out=DIR
         --config=configs/unified_long_sequence/needle.py --config.data.source.length=128
         --config.evals.test.data.source.length=128
Data:    generated, no network
Cost:    ten seconds on two CPU cores
Expect:  test/accuracy within 0.04 of the numbers above
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("context_4", "context_8", "context_16", "context_32", "context_64")
LENGTH, CLASSES = 64, 4


def get_config(variant: str = "") -> Recipe:
    variant = variant or VARIANTS[-1]
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    context = int(variant.partition("_")[2])
    source = {"name": "needle", "length": LENGTH, "context": context, "classes": CLASSES}
    return Recipe(
        seed=0,
        steps=400,
        batch=64,
        model={
            "name": "sequence_mixer",
            "length": context,
            "vocab": 2 * CLASSES + 2,
            "num_classes": CLASSES,
            "dim": 32,
            "depth": 1,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "mixer": "softmax",
            "bias": "identity",
            "pool": "last",
        },
        task={"name": "classification"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=5e-3, warmup=30, clip=1.0),
        evals={
            "test": Evaluation(data=Data(source={**source, "split": "test", "size": 2_048}),
                               batch=512)
        },
        checkpoint=Checkpoint(every=400, keep=1, best="test/accuracy"),
        report=Report(every=100, samples=0),
    )  # fmt: skip
