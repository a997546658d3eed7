# SPDX-License-Identifier: Apache-2.0
"""Informer on ETT, ECL and Weather as CAB trains it; the variant is set and features.

Variants: etth1, etth2, ettm1, ecl, weather, each with _m (all columns) or _s (the target). CAB
(arXiv 2210.07661) averages both; change attention with --config.model.encoder_attention=NAME,
decoder_attention, cross_attention. The learning rate is halved after every epoch but the first,
where the release leaves it, and is 1e-4 before. There is no early stopping: six epochs, and every
window of the test set counts (the release leaves out an incomplete last batch).

Run:     python -m launch.train --config=configs/cab/informer_ett.py:etth1_m --workdir=DIR
         --config.data.source.root=ROOT --config.evals.val.data.source.root=ROOT
         --config.evals.test.data.source.root=ROOT
Data:    ETTh1.csv, ETTh2.csv, ETTm1.csv, ECL.csv, WTH.csv of the Informer release, in ROOT
Cost:    not run by us; minutes to an hour on one GPU
Expect:  averages over both features of CAB's attentions: ETT 1.15 to 1.25 (mse), ECL 0.46 to 0.49,
         Weather 0.52 to 0.88; not measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

# Data set, rows of its training split, length of the past, horizon.
SETS = {
    "etth1_m": ("ETTh1", 8_640, 336, 720),
    "etth1_s": ("ETTh1", 8_640, 168, 720),
    "etth2_m": ("ETTh2", 8_640, 720, 720),
    "etth2_s": ("ETTh2", 8_640, 336, 720),
    "ettm1_m": ("ETTm1", 34_560, 672, 672),
    "ettm1_s": ("ETTm1", 34_560, 384, 672),
    "ecl_m": ("ECL", 18_412, 336, 960),
    "ecl_s": ("ECL", 18_412, 336, 960),
    "weather_m": ("WTH", 24_544, 720, 720),
    "weather_s": ("WTH", 24_544, 720, 720),
}
VARIANTS = tuple(SETS)
EPOCHS, BATCH, RATE = 6, 32, 1e-4


def get_config(variant: str = "") -> Recipe:
    variant = variant or "etth1_m"
    if variant not in SETS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    dataset, rows, length, horizon = SETS[variant]
    epoch = (rows - length - horizon + 1) // BATCH
    source = {
        "name": "series_file",
        "root": "",
        "dataset": dataset,
        "features": variant[-1].upper(),
        "length": length,
        "horizon": horizon,
    }
    held_out = lambda split, every: Evaluation(
        data=Data(source={**source, "split": split}), every=every
    )
    return Recipe(
        seed=0,
        steps=EPOCHS * epoch,
        batch=BATCH,
        model={"name": "informer", "preset": variant},
        task={"name": "forecasting", "denormalised": True},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(
            lr=RATE, warmup=epoch, warmup_lr=RATE, decay="step", decay_every=epoch, decay_rate=0.5
        ),
        evals={"val": held_out("val", epoch), "test": held_out("test", 0)},
        checkpoint=Checkpoint(every=epoch, keep=2),
        report=Report(every=50, samples=0),
    )
