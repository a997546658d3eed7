# SPDX-License-Identifier: Apache-2.0
"""Small CrossViT on the handwritten digits that ship with scikit-learn: the main example.

Variants: cross (the paper), none, all_attention, cls, pairwise (its ablations of the fusion), fine
and coarse (one branch alone).

Run:     python -m launch.train --config=configs/crossvit/digits.py --workdir=runs/crossvit-digits
Data:    bundled with scikit-learn, no network; 1,437 images train, 360 test
Cost:    about two minutes on two CPU cores        Expect: test/accuracy >= 0.95
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

FUSIONS = ("cross", "none", "all_attention", "cls", "pairwise", "fine", "coarse")


def get_config(variant: str = "") -> Recipe:
    fusion = variant or "cross"
    if fusion not in FUSIONS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, FUSIONS)}")
    scale = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    train = {"name": "image_train", "size": 48, "scale": (0.7, 1.0), "flip": 0.0}
    plain = {"rand_augment": "", "color_jitter": 0.0, "erase": 0.0}
    return Recipe(
        seed=0,
        steps=1_000,
        batch=64,
        model={
            "name": "crossvit",
            "num_classes": 10,
            "image_size": (48, 48),
            "dims": (48, 96),
            "depth": ((1, 2, 0), (1, 2, 0)),
            "num_heads": (4, 4),
            "mlp_ratio": (2.0, 2.0),
            "fusion": fusion,
        },
        task={"name": "classification", "label_smoothing": 0.1},
        data=Data(
            source={"name": "digits", "split": "train"},
            pipeline={**train, **plain, **scale},
        ),
        optim=Optim(
            lr=1e-3,
            warmup=50,
            end_lr=1e-5,
            weight_decay=0.05,
            no_decay=("^cls_", "^positions_"),
            clip=1.0,
        ),
        evals={
            "test": Evaluation(
                data=Data(
                    source={"name": "digits", "split": "test"},
                    pipeline={"name": "image_eval", "size": 48, "crop_ratio": 1.0, **scale},
                ),
                every=250,
            )
        },
        checkpoint=Checkpoint(every=250, keep=2, best="test/accuracy"),
        report=Report(every=50),
    )
