# SPDX-License-Identifier: Apache-2.0
"""LLaMA-2 7B trained on packed tokens over 512 chips: parameters, heads and tokens are divided.

Two million tokens per step: 512 texts of 4,096, documents that do not see each other. Parameters
and optimiser state are divided over fsdp, heads and hidden units over model, every text over
context (keys and values travel round a ring of two).

Run:     python -m launch.train --config=configs/decoder_lm/seven_b.py --workdir=DIR
         --config.data.source.root=ROOT
Compile: python -m launch.compile --config=configs/decoder_lm/seven_b.py --topology=v5p:8x8x8
Data:    ROOT/train.bin and ROOT/val.bin, uint16 tokens of LLaMA's vocabulary, 2 behind a document
Cost:    512 TPU v5p chips, not run by us
Expect:  compiles for v5p:8x8x8, far below 95 GiB per device; its losses were not measured
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Mesh, Optim, Recipe, Report

TOKENS = 1_000_000_000_000


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: seven_b.py has none")
    length, batch = 4096, 512
    source = {"name": "packed_tokens", "root": "", "length": length, "end": 2}
    return Recipe(
        seed=0,
        steps=TOKENS // (length * batch),
        batch=batch,
        model={
            "name": "decoder",
            "preset": "llama2_7b",
            "dtype": "bfloat16",
            "remat": "full",
            "attention_implementation": "context:ring",
        },
        task={"name": "language", "packed": True, "z_loss": 1e-4, "logits_chunk": 512},
        data=Data(source={**source, "split": "train"}, workers=8),
        optim=Optim(lr=3e-4, end_lr=3e-5, warmup=2_000, clip=1.0, weight_decay=0.1, beta2=0.95),
        mesh=Mesh(data=1, fsdp=64, model=4, context=2),
        evals={
            "val": Evaluation(data=Data(source={**source, "split": "val"}), every=1_000, batch=512)
        },
        checkpoint=Checkpoint(every=1_000),
        report=Report(samples=0),
    )
