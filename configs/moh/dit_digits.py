# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits of a class by diffusion: DiT with plain heads, or with heads as experts.

Variants: dense; moh_90 and moh_75, which use 89 and 75 percent of the heads, layer by layer as
MoH-DiT-S of arXiv 2410.11842 does. In place of the FID, the report says which share of samples a
classifier fitted to the digits recognises, and a Frechet distance (attnjax/metrics/samples.py).

Run:     python -m launch.train --config=configs/moh/dit_digits.py:moh_75 --workdir=DIR
Data:    bundled with scikit-learn, no network; 1,437 images of 8 x 8
Cost:    about six minutes on one CPU core (6.5 steps/s), of which half a minute samples
Expect:  samples/recognised above 0.85 and samples/frechet below 1.2 (seed 0: dense 0.911 and 0.53,
         moh_90 0.920 and 0.90, moh_75 0.919 and 0.87); real pictures reach 0.989 and 0.23
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

MIXTURES = {
    "dense": (),
    "moh_90": ((4, 6, 3, 2), (2, 6, 6, 0)),
    "moh_75": ((1, 6, 2, 1), (2, 6, 3, 1), (2, 6, 3, 2), (1, 6, 6, 0)),
}
VARIANTS = tuple(MIXTURES)


def get_config(variant: str = "") -> Recipe:
    kind = variant or "dense"
    if kind not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    data = Data(source={"name": "digits", "split": "train"}, pipeline={"name": "pictures"})
    return Recipe(
        seed=0,
        steps=2_000,
        batch=64,
        model={
            "name": "dit",
            "num_classes": 10,
            "image_size": 8,
            "channels": 1,
            "width": 96,
            "depth": 6,
            "num_heads": 6,
            "mixture": MIXTURES[kind],
        },
        task={"name": "class_diffusion", "sample_steps": 50, "judge": True},
        data=data,
        optim=Optim(name="adamw", lr=1e-3, decay="constant", clip=1.0, ema=0.995),
        evals={"samples": Evaluation(data=data, batch=480)},
        checkpoint=Checkpoint(every=1_000, keep=1),
        report=Report(every=100, samples=0),
    )
