# SPDX-License-Identifier: Apache-2.0
"""CAB's masked language modelling: hidden tokens of a book, by RoBERTa with a noncausal attention.

Zhang et al., "CAB", arXiv 2210.07661: perplexity on PG-19 at 2,048 tokens is 3.26 (softmax by
FlashAttention), 3.38 (LongShort), 4.18 (local), 5.25 (cosFormer), 6.32 (Nystrom), 6.45 (LARA),
10.50 (ABC), 25.34 (S4D), 111.73 (Performer), 186.35 (ProbSparse). The default is small: hidden
bytes of Python's own handbook. The variant "published" has the settings of the release: RoBERTa's
base preset, GPT-2's vocabulary, 125,000 steps of 524,288 tokens; give its files with
--config.data.source.root=DIR --config.data.source.tokenizer=FILE, and for the evaluation, too.

Run:     python -m launch.train --config=configs/cab/masked_language_model.py --workdir=DIR
         --config.model.attention=local
Data:    ships with Python; "published": PG-19, a .txt file per book in train and validation, and
         the tokenizer.json of GPT-2
Cost:    small: minutes on two CPU cores; published: eight 80 GB GPUs in the paper, not run by us
Expect:  small: validation/loss below 3.0, 2.90 measured by us (frequencies of bytes
         alone: 3.33); published: validation/perplexity near the paper's
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("small", "published")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "small"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "text_files", "root": "$PG19", "length": 2048, "reserved": 4,
              "tokenizer": "$PG19/tokenizer.json"}  # fmt: skip
    section = lambda source, split, vocab_size: Data(
        source={**source, "split": split},
        pipeline={"name": "mask_tokens", "vocab_size": vocab_size},
    )
    # 50,257 of GPT-2 and four reserved ones; padding is 0 in this library's data.
    vocab_size = 50_261
    recipe = Recipe(
        seed=0,
        steps=125_000,
        batch=256,
        model={
            "name": "encoder",
            "preset": "roberta_base",
            "padding": 0,
            "vocab_size": vocab_size,
            "length": 2048,
            "attention": "softmax",
            "dropout": 0.1,
        },
        task={"name": "masked_language", "logits_chunk": 512},
        data=section(source, "train", vocab_size),
        optim=Optim(
            lr=3e-4, warmup=5_000, decay="linear", weight_decay=0.01, beta2=0.98, eps=1e-6,
            accumulate=4,
        ),
        evals={
            "validation": Evaluation(
                data=section(source, "validation", vocab_size), every=5_000, batch=64
            )
        },
        checkpoint=Checkpoint(every=1_000, keep=2),
        report=Report(every=100, samples=0),
    )  # fmt: skip
    if variant == "small":
        source = {"name": "stdlib_text", "length": 128, "reserved": 4}
        recipe.steps, recipe.batch = 400, 32
        recipe.model |= {
            "vocab_size": 260, "length": 128, "width": 64, "depth": 2, "num_heads": 4,
            "hidden": 256, "dropout": 0.0,
        }  # fmt: skip
        recipe.task["logits_chunk"] = 0
        recipe.data = section(source, "train", 260)
        recipe.evals["validation"] = Evaluation(data=section(source, "test", 260))
        recipe.optim.lr, recipe.optim.warmup, recipe.optim.accumulate = 1.5e-3, 40, 1
        recipe.checkpoint.every, recipe.report.every = 200, 20
    return recipe
