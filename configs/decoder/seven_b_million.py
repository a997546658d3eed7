# SPDX-License-Identifier: Apache-2.0
"""LLaMA-2 7B's shape on sequences of a million tokens, divided over 64 devices.

Width 4096, 32 layers of 32 heads, hidden width 11,008, vocabulary 32,000; batch 1. Parameters and
optimiser state are divided over the same axis as the tokens. Variants: ring (keys and values travel
round the ring) and usp (heads are exchanged among neighbours, keys and values between groups).

Run:     python -m launch.train --config=configs/decoder/seven_b_million.py:ring --workdir=DIR
Compile: python -m launch.compile --config=configs/decoder/seven_b_million.py:ring
         --topology=v5p:4x4x4
Data:    generated, no network
Cost:    64 TPU v5p chips        Expect: compiles; below 95 GiB per device
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Mesh, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("ring", "usp")
LENGTH = 2**20


def get_config(variant: str = "") -> Recipe:
    variant = variant or "ring"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    return Recipe(
        seed=0,
        steps=1_000,
        batch=1,
        model={
            "name": "decoder",
            "preset": "llama2_7b",
            "length": LENGTH,
            "rotary": 10_000_000.0,
            "dtype": "bfloat16",
            "remat": "full",
            "attention_implementation": f"context:{variant}",
        },
        task={"name": "language", "logits_chunk": LENGTH // 16},
        data=Data(source={"name": "markov_text", "length": LENGTH, "order": 2, "size": 4_096}),
        optim=Optim(lr=1e-4, warmup=50, clip=1.0, weight_decay=0.1, beta2=0.95),
        mesh=Mesh(data=1, fsdp=1, model=1, context=64),
        checkpoint=Checkpoint(every=100),
        report=Report(samples=0),
    )
