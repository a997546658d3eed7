# SPDX-License-Identifier: Apache-2.0
"""A small LLaMA on the source text of Python's standard library, byte by byte.

A twentieth of the modules is held out. A 5-gram with Kneser-Ney smoothing, counted on the same
training text, needs 1.81 bits per byte (Python 3.11).

Run:     python -m launch.train --config=configs/decoder_lm/smoke.py --workdir=DIR
         python -m launch.evaluate --workdir=DIR --ngram=5
Data:    the source text on the machine, no network
Cost:    about fifteen minutes on two CPU cores
Expect:  test/bits_per_byte 1.63
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "stdlib_source", "length": 256, "reserved": 4}
    return Recipe(
        seed=0,
        steps=2_000,
        batch=16,
        model={
            "name": "decoder",
            "vocab_size": 260,
            "length": 256,
            "width": 128,
            "depth": 4,
            "heads": (4, 2),
            "hidden": 384,
            "tied": True,
        },
        task={"name": "language", "packed": True},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=4e-3, warmup=100, clip=1.0, weight_decay=0.01, beta2=0.98),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}))},
        checkpoint=Checkpoint(every=500, keep=1),
        report=Report(every=50, samples=0),
    )
