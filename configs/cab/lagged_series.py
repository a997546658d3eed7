# SPDX-License-Identifier: Apache-2.0
"""Noncausal cross-attention with a known answer: a step is known from one place of the past.

Values come again 16 steps later, with noise of 9.75 per cent of the variance; nothing else is known
of them. The decoder begins with the last four steps of 32, so that only its attention to the
encoder reaches the place, and a model without it has an error of 1. Choose attention with
--config.model.cross_attention=NAME.

Run:     python -m launch.train --config=configs/cab/lagged_series.py --workdir=DIR
Data:    generated, no network
Cost:    half a minute on two CPU cores
Expect:  test/mse 0.11 to 0.16 with softmax (four seeds; nothing can be below 0.0975), 0.37 with
         cosformer, 0.55 to 0.72 with abc and performer, 1.05 to 1.09 without attention
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: lagged_series.py has none")
    source = {"name": "lagged_series", "channels": 2, "length": 32, "horizon": 8, "lag": 16}
    return Recipe(
        seed=0,
        steps=400,
        batch=64,
        model={
            "name": "informer",
            "lengths": (32, 4, 8),
            "channels": 2,
            "width": 64,
            "num_heads": 4,
            "hidden": 128,
            "depth": (1, 1),
            "encoder_attention": "softmax",
            "decoder_attention": "softmax",
        },
        task={"name": "forecasting"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=2e-3, warmup=50, clip=1.0),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test"}))},
        checkpoint=Checkpoint(every=400, keep=1),
        report=Report(every=100, samples=0),
    )
