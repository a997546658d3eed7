# SPDX-License-Identifier: Apache-2.0
"""The next byte of a small text: bits per byte, and what longer context is worth there.

Variants are causal mixers: softmax, window, convolution, s4d, lru, gated_recurrence,
transformer_xl, favor.

Run:     python -m launch.train --config=configs/unified_long_sequence/text_bytes.py:s4d
         --workdir=DIR
Data:    descriptions of data sets that ship with scikit-learn, no network; any text file with
         --config.data.source.path=FILE --config.evals.test.data.source.path=FILE
Cost:    not run by us at this length; minutes on a GPU
Expect:  test/bits falls below that of an order-0 model (about 5); not measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("softmax", "window", "convolution", "s4d", "lru", "gated_recurrence",
            "transformer_xl", "favor")  # fmt: skip
ALWAYS_CAUSAL = ("lru", "gated_recurrence", "transformer_xl")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "softmax"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "text_bytes", "path": "", "length": 256}
    return Recipe(
        seed=0,
        steps=2_000,
        batch=32,
        model={
            "name": "sequence_mixer",
            "preset": "small",
            "length": 256,
            "vocab": 257,
            "num_classes": 257,
            "mixer": variant,
            "mixer_options": {} if variant in ALWAYS_CAUSAL else {"causal": True},
            "pool": "none",
            "dropout": 0.1,
        },
        task={"name": "next_token"},
        data=Data(source={**source, "split": "train", "stride": 32}),
        optim=Optim(lr=1e-3, warmup=100, weight_decay=0.05, no_decay=("random_projection$",)),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}), every=500)},
        checkpoint=Checkpoint(every=500, keep=2, best="test/accuracy"),
        report=Report(every=50, samples=0),
    )
