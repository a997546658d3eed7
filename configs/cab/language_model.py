# SPDX-License-Identifier: Apache-2.0
"""CAB's language modelling: the next token of a book, by GPT-2 with a causal attention.

Zhang et al., "CAB", arXiv 2210.07661: perplexity on PG-19 at 8,192 tokens is 15.52 (LongShort),
15.78 (S4D), 16.02 (softmax by FlashAttention), 19.73 (local), 29.13 (ABC). The default is small:
the next byte of Python's own handbook. The variant "published" has the settings of the release:
GPT-2's vocabulary and small preset, 125,000 steps of 131,072 tokens. (The release trains fairseq's
transformer_lm_gpt, of the same size but with sinusoids for positions and the exact GELU.) Give its
files with
--config.data.source.root=DIR --config.data.source.tokenizer=FILE, and for the evaluation, too.

Run:     python -m launch.train --config=configs/cab/language_model.py --workdir=DIR
         --config.model.attention=local
Data:    ships with Python; "published": PG-19, a .txt file per book in train, validation, test, and
         the tokenizer.json of GPT-2
Cost:    small: minutes on two CPU cores; published: eight 80 GB GPUs in the paper, not run by us
Expect:  small: test/bits_per_byte below 3.6, 3.46 measured by us (pairs of bytes alone: 3.53);
         published: test/perplexity near the paper's
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("small", "published")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "small"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "text_files", "root": "$PG19", "length": 8192,
              "tokenizer": "$PG19/tokenizer.json"}  # fmt: skip
    recipe = Recipe(
        seed=0,
        steps=125_000,
        batch=16,
        model={
            "name": "gpt2",
            "preset": "small",
            "length": 8192,
            "attention": "softmax",
            "dropout": 0.0,
            "attention_dropout": 0.1,
        },
        task={"name": "language", "logits_chunk": 512},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(
            lr=5e-4, warmup=10_000, warmup_lr=1e-7, decay="inverse_sqrt", weight_decay=0.01
        ),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}), every=5_000)},
        checkpoint=Checkpoint(every=1_000, keep=2),
        report=Report(every=100, samples=0),
    )
    if variant == "small":
        source = {"name": "stdlib_text", "length": 128}
        recipe.steps, recipe.batch = 300, 16
        recipe.model |= {
            "vocab_size": 256, "length": 128, "width": 64, "depth": 2, "num_heads": 4,
            "hidden": 256, "attention_dropout": 0.0,
        }  # fmt: skip
        recipe.task["logits_chunk"] = 0
        recipe.data.source = {**source, "split": "train"}
        recipe.evals["test"] = Evaluation(data=Data(source={**source, "split": "test"}))
        recipe.optim.lr, recipe.optim.warmup = 3e-3, 40
        recipe.checkpoint.every, recipe.report.every = 200, 20
    return recipe
