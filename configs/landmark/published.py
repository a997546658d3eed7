# SPDX-License-Identifier: Apache-2.0
"""The paper's models trained from nothing on PG-19 or arXiv: Table 1; variants are the presets.

arXiv 2305.16300, Section 4.1: 240,000 steps of 128 texts of 512 slots, landmarks among them. The
evaluation reads chunks of 250 tokens and retrieves two blocks of fifty. Variants: paper (with
landmarks), baseline_512, baseline_360; baseline_xl, Transformer-XL's recurrence over segments of
2,048 tokens in parts of 256, and context_miss, paper with a context-miss token that controls every
second landmark, both for 60,000 steps as in the paper; jumps, paper with positions that skip up to
100 places behind every landmark (Appendix E).

Run:     python -m launch.train --config=configs/landmark/published.py --workdir=DIR
         --config.data.source.root=ROOT --config.evals.val.data.source.root=ROOT
Data:    ROOT/train.bin and ROOT/val.bin, uint16 tokens of GPT-2, 50256 behind every document
Cost:    not run by us; days on four A100 in the paper
Expect:  val/perplexity 16.24 at 512 tokens of PG-19 with landmarks, 16.32 without; 15.14 at 2,048
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("paper", "baseline_512", "baseline_360", "baseline_xl", "context_miss", "jumps")
LENGTHS = {"baseline_512": 512, "baseline_360": 360, "baseline_xl": 2_048}
LANDMARKS = {"context_miss": {"context_miss": 0.5}, "jumps": {"jump": 100}}
LONG = 2_048


def get_config(variant: str = "") -> Recipe:
    variant = variant or "paper"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    is_baseline = variant in LENGTHS
    source = {"name": "packed_tokens", "root": "", "length": LENGTHS.get(variant, 502)}
    held_out = {**source, "split": "val", "length": LENGTHS.get(variant, LONG)}
    steps = 60_000 if variant in ("baseline_xl", "context_miss") else 240_000
    return Recipe(
        seed=0,
        steps=steps,
        batch=128,
        model={
            "name": "landmark",
            "preset": variant if is_baseline else "paper",
            "landmarks": LANDMARKS.get(variant),
            "dtype": "bfloat16",
        },
        task={"name": "long_language", "chunk": 250, "blocks": 40, "logits_chunk": 64},
        data=Data(source={**source, "split": "train"}, workers=4),
        optim=Optim(
            lr=2e-3,
            warmup=steps // 50,
            warmup_lr=2e-5,
            end_lr=4e-4,
            beta2=0.95,
            weight_decay=1e-3,
            no_decay=("embedding",),
            clip=1.0,
        ),
        evals={"val": Evaluation(data=Data(source=held_out), every=10_000, batch=8)},
        checkpoint=Checkpoint(every=5_000, keep=2),
        report=Report(every=100, samples=0),
    )
