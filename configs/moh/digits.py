# SPDX-License-Identifier: Apache-2.0
"""Small MoH-ViT on the handwritten digits that ship with scikit-learn.

Variants: dense (all heads, no gates), moh_75 and moh_50, which use three quarters and half of the
heads, all_shared (gates on all heads, none left out) and unbalanced, moh_50 without its loss.

Run:     python -m launch.train --config=configs/moh/digits.py:moh_75 --workdir=DIR
Data:    bundled with scikit-learn, no network; 1,437 images train, 360 test
Cost:    some minutes on two CPU cores        Expect: test/accuracy not measured yet
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

HEADS = (2, 4, 8, 8)
MIXTURES = {
    "dense": {},
    "moh_75": {"shared": (2, 4, 2, 2), "chosen": (0, 0, 3, 3)},
    "moh_50": {"shared": (0, 1, 2, 2), "chosen": (1, 1, 2, 2)},
    "all_shared": {"shared": HEADS, "chosen": (0, 0, 0, 0)},
    "unbalanced": {"shared": (0, 1, 2, 2), "chosen": (1, 1, 2, 2), "balance": 0.0},
}
VARIANTS = tuple(MIXTURES)


def get_config(variant: str = "") -> Recipe:
    variant = variant or "moh_75"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    scale = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    train = {"name": "image_train", "size": 64, "scale": (0.7, 1.0), "flip": 0.0}
    plain = {"rand_augment": "", "color_jitter": 0.0, "erase": 0.0}
    return Recipe(
        seed=0,
        steps=800,
        batch=64,
        model={
            "name": "moh",
            "num_classes": 10,
            "image_size": 64,
            "widths": (16, 32, 64, 64),
            "num_heads": HEADS,
            "depths": (1, 1, 2, 2),
            "ratios": (2, 2, 2, 2),
            **MIXTURES[variant],
        },
        task={"name": "classification", "label_smoothing": 0.1},
        data=Data(
            source={"name": "digits", "split": "train"},
            pipeline={**train, **plain, **scale},
        ),
        optim=Optim(lr=1e-3, warmup=50, end_lr=1e-5, weight_decay=0.05, clip=1.0),
        evals={
            "test": Evaluation(
                data=Data(
                    source={"name": "digits", "split": "test"},
                    pipeline={"name": "image_eval", "size": 64, "crop_ratio": 1.0, **scale},
                ),
            )
        },
        checkpoint=Checkpoint(every=400, keep=1),
        report=Report(every=50),
    )
