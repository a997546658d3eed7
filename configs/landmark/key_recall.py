# SPDX-License-Identifier: Apache-2.0
"""One block among many holds a key: landmark attention finds it far beyond the length of training.

Trained on 8 blocks of 8 tokens, tried on 8, 32 and 128 through the cache, two blocks retrieved per
token and head. Variants: landmark; window, the same network with a sliding window as long as the
chunks that landmarks are read in, 32 tokens; causal, attention to everything.

Run:     python -m launch.train --config=configs/landmark/key_recall.py:landmark --workdir=DIR
Data:    generated, no network
Cost:    five to ten minutes on two CPU cores
Expect:  with landmarks blocks_32/exact_match 1.0, 0.57 and 0.97 (seeds 0, 1, 2), 1.0 after 3,000
         steps (seeds 0 and 102); with a window 0.24, what two layers of it reach
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("landmark", "window", "causal")
CHUNK = 32


def get_config(variant: str = "") -> Recipe:
    variant = variant or "landmark"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "key_recall", "blocks": 8, "block": 8}
    test = lambda blocks, size: Evaluation(
        data=Data(source={**source, "split": "test", "blocks": blocks, "size": size}), batch=32
    )
    return Recipe(
        seed=0,
        steps=2_000,
        batch=64,
        model={
            "name": "landmark",
            "attention": variant,
            "window": CHUNK if variant == "window" else None,
            "vocab_size": 267,
            "length": 68,
            "block": 8,
            "width": 64,
            "num_heads": 4,
            "hidden": 128,
        },
        task={"name": "long_language", "chunk": CHUNK, "blocks": 160, "scored": True},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=3e-3, warmup=100, clip=1.0),
        evals={"blocks_8": test(8, 256), "blocks_32": test(32, 256), "blocks_128": test(128, 128)},
        checkpoint=Checkpoint(every=2_000, keep=1),
        report=Report(every=100, samples=0),
    )
