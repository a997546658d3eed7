# SPDX-License-Identifier: Apache-2.0
"""Informer on seasonal series with autoregressive noise: no forecast beats a known error.

Three sines of 12, 24 and 168 hours and noise; what nobody can know of the next 24 steps is 9.6 per
cent of the variance (`SeasonalSeries.floor` of the test split). Choose attention with
--config.model.encoder_attention=NAME, decoder_attention, cross_attention.

Run:     python -m launch.train --config=configs/cab/seasonal_series.py --workdir=DIR
Data:    generated, no network
Cost:    a minute on two CPU cores
Expect:  test/mse within 30 percent of the floor, 0.0955; 0.117 measured, val/mse 0.134
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: seasonal_series.py has none")
    source = {"name": "seasonal_series", "channels": 2, "length": 96, "horizon": 24}
    return Recipe(
        seed=0,
        steps=600,
        batch=32,
        model={
            "name": "informer",
            "lengths": (96, 24, 24),
            "channels": 2,
            "width": 64,
            "num_heads": 4,
            "hidden": 128,
        },
        task={"name": "forecasting"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=2e-3, warmup=50, clip=1.0, decay="step", decay_every=100, decay_rate=0.5),
        evals={
            "val": Evaluation(data=Data(source={**source, "split": "val"}), every=200),
            "test": Evaluation(data=Data(source={**source, "split": "test"})),
        },
        checkpoint=Checkpoint(every=200, keep=1),
        report=Report(every=50, samples=0),
    )
