# SPDX-License-Identifier: Apache-2.0
"""The paper's training runs: 15 billion tokens of SlimPajama for a decoder with relaxed mixers.

Xue, Moosavi and Aletras, "Deconstructing Attention", arXiv 2510.11602. WikiText perplexity of the
500M models (by word, in lm-eval): standard 38.1; hybrids: random_embedding 39.3, non_approximate
39.4, approximate 39.4, fixed_sequence 38.5, static_embedding 38.7, mlp 45.8; uniform: approximate
47.9, fixed_sequence 79.1, static_embedding 79.9, random_embedding 84.8, mlp 993.5. Variants are the
presets; mixer and layout are fields of the model. The paper also speaks of 120,000 steps, which do
not fit 15 billion tokens in batches of half a million; these recipes take the tokens.

Run:     python -m launch.train --config=configs/deconstructing_attention/published.py:500m
         --workdir=DIR --config.model.mixer=random_embedding --config.model.layout=hybrid
Data:    $SLIMPAJAMA/{train,test}/*.bin, tokens of Pythia's tokenizer as uint16; the fixed sequence
         with --config.model.options (the first 2048 tokens of FineWeb-10BT in the paper)
Cost:    not run by us; about 4e19 operations for 500m
Expect:  test_2048/perplexity in the paper's order of mixers; by words with the corpus's number,
         --config.task.tokens_per_word; test_128 to test_1024: perplexity by context
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

CONTEXTS = (128, 256, 512, 1024, 2048)
VARIANTS = ("500m", "70m", "160m", "500m-gqa", "1.7b")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "500m"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "packed_tokens", "root": "$SLIMPAJAMA", "length": 2048}
    is_large = variant == "1.7b"
    return Recipe(
        seed=0,
        steps=85_831 if is_large else 28_610,
        batch=256,
        model={
            "name": "deconstructing_attention",
            "preset": variant,
            "mixer": "standard",
            "layout": "uniform",
            "dtype": "bfloat16",
            "remat": "full",
        },
        task={"name": "language", "logits_chunk": 256},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(
            lr=3e-4 if is_large else 4e-4,
            warmup=2_000,
            beta2=0.9999,
            weight_decay=0.1,
            clip=1.0,
        ),
        evals={
            f"test_{length}": Evaluation(
                data=Data(source={**source, "split": "test", "length": length}),
                # The paper's table of perplexity by context is made once, at the end.
                every=2_000 if length == CONTEXTS[-1] else 0,
            )
            for length in CONTEXTS
        },
        checkpoint=Checkpoint(every=1_000, keep=2),
        report=Report(every=50, samples=0),
    )
