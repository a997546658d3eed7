# SPDX-License-Identifier: Apache-2.0
"""A million tokens at once: exact attention over a mesh axis and a mixture of experts.

The system that the paper outlines, in the size that is asked of it: sequences of 2^20 bytes, width
1024, 16 heads, batch 1; 12 layers with 64 experts of hidden width 2816, two for each token, with a
capacity of 1.25, load-balancing loss 0.01 and z-loss 1e-3. 256 devices: tokens and experts over 64,
heads and hidden units over 4. It is there to be compiled; the text is a stand-in.

Run:     python -m launch.train --config=configs/unified_long_sequence/million.py --workdir=DIR
Compile: python -m launch.compile --config=configs/unified_long_sequence/million.py
         --topology=v5p:4x8x8
Data:    generated, no network
Cost:    256 TPU v5p chips        Expect: compiles; 3.6 GiB per device at most (32 are asked)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Mesh, Optim, Recipe, Report

LENGTH = 2**20


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: million.py has none")
    return Recipe(
        seed=0,
        steps=10_000,
        batch=1,
        model={
            "name": "decoder",
            "vocab_size": 256,
            "length": LENGTH,
            "width": 1024,
            "depth": 12,
            "heads": (16, 16),
            "hidden": 2816,
            "rotary": 10_000_000.0,
            "experts": {
                "count": 64, "top_k": 2, "capacity": 1.25, "load_loss": 0.01, "z_loss": 1e-3,
                "group": 1024,
            },
            "dtype": "bfloat16",
            "remat": "full",
        },
        task={"name": "language", "z_loss": 1e-4, "logits_chunk": LENGTH // 8},
        data=Data(source={"name": "markov_text", "length": LENGTH, "order": 2, "size": 16_384}),
        optim=Optim(lr=3e-4, warmup=500, clip=1.0, weight_decay=0.1, beta2=0.95),
        mesh=Mesh(data=1, fsdp=1, model=4, context=64),
        checkpoint=Checkpoint(every=500),
        report=Report(samples=0),
    )  # fmt: skip
