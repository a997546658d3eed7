# SPDX-License-Identifier: Apache-2.0
"""LLaMA 7B taught to use landmarks: the paper's fine-tuning, Section 4.2.

15,000 steps of 128 texts of 512 slots, a landmark behind every 50 tokens; the cosine is cut where
it has come down to a tenth, as with 0.4 cycles in the release. Start from LLaMA's own weights with
two more rows of tokens, or skip training: the released difference is added to them by

    python -m launch.convert --system=landmark --preset=llama_7b --input=DIFFERENCE --base=LLAMA
    --output=FILE

Run:     python -m launch.train --config=configs/landmark/llama_7b.py --workdir=DIR
         --config.data.source.root=ROOT --config.evals.val.data.source.root=ROOT
         --config.model.weights=FILE
Data:    ROOT/train.bin and ROOT/val.bin, uint16 tokens of LLaMA, 2 behind every document
Cost:    not run by us; eight A100 in the paper
Expect:  98 % of the pass keys at 32,000 tokens, five blocks per head and chunk, in the paper
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Mesh, Optim, Recipe, Report

STEPS, WARMUP = 15_000, 450


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: llama_7b.py has none")
    source = {"name": "packed_tokens", "root": "", "length": 502}
    return Recipe(
        seed=0,
        steps=STEPS,
        batch=128,
        model={
            "name": "landmark",
            "preset": "llama_7b",
            "weights": "",
            "dtype": "bfloat16",
            "remat": "full",
        },
        task={
            "name": "long_language",
            "chunk": 200,
            "blocks": 640,
            "top_k": 5,
            "retrieval": "max_over_tokens",
            "logits_chunk": 64,
        },
        data=Data(source={**source, "split": "train"}, workers=4),
        optim=Optim(
            lr=2e-5,
            warmup=WARMUP,
            # The whole cosine would take (15,000 - 450) / 0.8 steps.
            cooldown=-round((STEPS - WARMUP) / 4),
            beta2=0.999,
            weight_decay=0.1,
            accumulate=8,
            clip=1.0,
        ),
        mesh=Mesh(data=1, fsdp=-1),
        evals={"val": Evaluation(data=Data(source={**source, "split": "val"}), every=1_000)},
        checkpoint=Checkpoint(every=500, keep=2),
        report=Report(every=10, samples=0),
    )
