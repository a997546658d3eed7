# SPDX-License-Identifier: Apache-2.0
"""Smallest complete run of the encoder: hidden bytes of Python's own handbook.

Run:     python -m launch.train --config=configs/encoder/smoke.py --workdir=runs/encoder-smoke
Data:    the topics of pydoc, which ship with Python; no network
Cost:    about a minute on two CPU cores
Expect:  test/loss below 3.0 nats per hidden byte, 2.80 measured by us; frequencies of bytes
         alone leave 3.33
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "stdlib_text", "length": 64, "reserved": 4}
    masking = {"name": "mask_tokens", "vocab_size": 260}
    return Recipe(
        seed=0,
        steps=400,
        batch=32,
        model={
            "name": "encoder",
            "family": "bert",
            "vocab_size": 260,
            "length": 64,
            "width": 64,
            "depth": 2,
            "num_heads": 4,
            "hidden": 256,
            "dropout": 0.0,
        },
        task={"name": "masked_language", "logits_chunk": 32},
        data=Data(source={**source, "split": "train"}, pipeline=masking),
        optim=Optim(lr=3e-3, warmup=40, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}, pipeline=masking))},
        checkpoint=Checkpoint(every=100, keep=1),
        report=Report(every=20, samples=0),
    )
