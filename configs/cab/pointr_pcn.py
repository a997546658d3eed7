# SPDX-License-Identifier: Apache-2.0
"""PoinTr on PCN as CAB trains it; the variant is a preset: cab (default) or pcn.

cab has 1,536 proxies and 3,584 queries of four points, the lengths of CAB (arXiv 2210.07661, Table
1); pcn has PoinTr's 128 and 224. Both make 14,336 points and add the 2,048 of the input. Attention
is --config.model.encoder_attention=NAME, decoder_attention, cross_attention. An epoch is 28,974
models, each with one of its eight partial clouds; after every epoch the learning rate falls by the
21st root of 0.9, as in the release, not below a fiftieth (which 300 epochs do not reach).

Run:     python -m launch.train --config=configs/cab/pointr_pcn.py --workdir=DIR
         --config.data.source.root=ROOT --config.evals.test.data.source.root=ROOT
Data:    PCN (train, val and test with partial and complete clouds, and PCN.json) in ROOT
Cost:    not run by us; days on two GPUs of 80 GB, as the release of CAB used
Expect:  test/cd_l1 of CAB's attentions: 7.34 (abc) to 8.67 (cosformer), test/f_score 0.78 to 0.70;
         not measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("cab", "pcn")
MODELS, BATCH, EPOCHS, RATE = 28_974, 48, 300, 5e-4


def get_config(variant: str = "") -> Recipe:
    variant = variant or "cab"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    epoch = MODELS // BATCH
    source, pipeline = {"name": "pcn", "root": ""}, {"name": "point_clouds"}
    return Recipe(
        seed=0,
        steps=EPOCHS * epoch,
        batch=BATCH,
        model={"name": "pointr", "preset": variant},
        task={"name": "completion"},
        data=Data(source={**source, "split": "train"}, pipeline=pipeline, workers=8),
        optim=Optim(
            lr=RATE,
            decay="step",
            decay_every=epoch,
            decay_rate=0.9 ** (1 / 21),
            end_lr=0.02 * RATE,
            weight_decay=5e-4,
        ),
        evals={
            "test": Evaluation(
                data=Data(source={**source, "split": "test"}, pipeline=pipeline), every=10 * epoch
            )
        },
        checkpoint=Checkpoint(every=epoch, keep=2, best="test/f_score"),
        report=Report(every=50, samples=0),
    )
