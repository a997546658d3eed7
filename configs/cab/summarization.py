# SPDX-License-Identifier: Apache-2.0
"""CAB's summarisation: several articles and their summary, by a Transformer with any attentions.

Zhang et al., "CAB", arXiv 2210.07661: ROUGE-1/2/L on Multi-News, sources of 4,096 and summaries of
400 tokens, is 34.64/6.52/31.66 with softmax everywhere, 38.50/10.54/35.39 with local attention in
the encoder, 34.90/6.65/31.98 with S4D in the decoder, 32.22/5.55/29.53 with ABC between them.
Variants: "published" has the settings of the release (50,000 steps of 64 pairs, the vocabulary of
BART); "pairs" the same on files of one's own; the default is small, with bytes of Multi-News.

Run:     python -m launch.train --config=configs/cab/summarization.py --workdir=DIR
         --config.model.encoder_attention=local
Data:    multi_news of TensorFlow Datasets, prepared under $TFDS_DATA_DIR; "published": also the
         tokenizer.json of bart-base, --config.data.source.tokenizer=FILE; "pairs": train.jsonl and
         test.jsonl with the fields document and summary, under --config.data.source.root=DIR
Cost:    published: four 80 GB GPUs in the paper, not run by us
Expect:  test/perplexity falls; ROUGE by attnjax.train.summaries near the paper's
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("small", "published", "pairs")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "small"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    lengths = (512, 128) if variant == "small" else (4096, 400)
    source = {"lengths": lengths, "tokenizer": "bytes"}
    if variant == "pairs":
        source |= {"name": "text_pairs", "root": "$PAIRS"}
    else:
        source |= {"name": "multi_news"}
    if variant == "published":
        source["tokenizer"] = "$TFDS_DATA_DIR/bart-base/tokenizer.json"
    recipe = Recipe(
        seed=0,
        steps=50_000,
        batch=64,
        model={
            "name": "encoder_decoder",
            "preset": "base",
            # 50,265 of BART and four reserved ones, or 256 bytes and these.
            "vocab_size": 50_269 if variant == "published" else 260,
            "lengths": lengths,
            "encoder_attention": "softmax",
            "decoder_attention": "softmax",
            "cross_attention": "softmax",
            "dropout": 0.1,
        },
        task={
            "name": "sequence_to_sequence",
            "label_smoothing": 0.1,
            "shortest": 200,
            "longest": 400,
        },
        data=Data(source={**source, "split": "train"}),
        optim=Optim(
            lr=5e-4, warmup=1_000, decay="inverse_sqrt", weight_decay=0.01, beta2=0.98, accumulate=2
        ),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}), every=5_000)},
        checkpoint=Checkpoint(every=1_000, keep=2),
        report=Report(every=100, samples=0),
    )
    if variant == "small":
        recipe.steps, recipe.batch = 1_000, 8
        recipe.model |= {"width": 64, "depth": (2, 2), "num_heads": 4, "hidden": 256}
        recipe.task |= {"shortest": 16, "longest": 128}
        recipe.optim.lr, recipe.optim.warmup, recipe.optim.accumulate = 2e-3, 100, 1
        recipe.report.every = 20
    return recipe
