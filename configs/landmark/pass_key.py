# SPDX-License-Identifier: Apache-2.0
"""A number hidden in a text far longer than those of training, read byte by byte.

Trained on prompts of 400 bytes, tried up to 6,400 through the cache. Variants: landmark;
context_miss, with the token that decides whether to look into the cache; window, the same network
with a sliding window as long as the chunks.

Run:     python -m launch.train --config=configs/landmark/pass_key.py:landmark --workdir=DIR
Data:    generated, no network
Cost:    about half an hour on two CPU cores
Expect:  not measured; exact_match is the accuracy of the paper, 98 % for LLaMA 7B at 32,000 tokens
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("landmark", "context_miss", "window")
CHUNK = 120
LENGTHS = (400, 1_600, 6_400)


def get_config(variant: str = "") -> Recipe:
    variant = variant or "landmark"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "pass_key", "length": LENGTHS[0]}
    is_window = variant == "window"
    test = lambda length: Evaluation(
        data=Data(source={**source, "split": "test", "length": length, "size": 50}), batch=10
    )
    return Recipe(
        seed=0,
        steps=3_000,
        batch=16,
        model={
            "name": "landmark",
            "attention": "window" if is_window else "landmark",
            "window": CHUNK if is_window else None,
            "landmarks": {"context_miss": 0.5} if variant == "context_miss" else None,
            "length": LENGTHS[0],
            "block": 30,
            "width": 128,
            "num_heads": 4,
            "hidden": 512,
        },
        task={"name": "long_language", "chunk": CHUNK, "blocks": 240, "scored": True},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=2e-3, warmup=100, clip=1.0),
        evals={f"bytes_{length}": test(length) for length in LENGTHS},
        checkpoint=Checkpoint(every=3_000, keep=1),
        report=Report(every=100, samples=0),
    )
