# SPDX-License-Identifier: Apache-2.0
"""One block among many holds a key: landmark attention finds it far beyond the length of training.

Trained on 8 blocks of 8 tokens, tried on 8, 32 and 128 through the cache, two blocks retrieved per
token and head. Variants: landmark; window, the same network with a sliding window as long as the
chunks that landmarks are read in, 32 tokens; causal, attention to everything.

Run:     python -m launch.train --config=configs/landmark/key_recall.py:landmark --workdir=DIR
Data:    generated, no network
Cost:    about five minutes on two CPU cores
Expect:  with landmarks blocks_32/exact_match 0.98 from seed 100, but 0.08 from seed 0, which needs
         more steps (0.63 after 2,500); with a window not measured yet
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
        steps=3_000,
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
        checkpoint=Checkpoint(every=3_000, keep=1),
        report=Report(every=100, samples=0),
    )
