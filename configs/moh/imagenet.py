# SPDX-License-Identifier: Apache-2.0
"""MoH-ViT on ImageNet-1k with the released code's recipe: 300 epochs; variants are the presets.

Top-1 in the paper (Table 2): small_80 84.7, small_75 84.6, TransNeXt-Small 84.7; base_75 84.9,
base_50 84.7, TransNeXt-Base 84.8.

Run:     python -m launch.train --config=configs/moh/imagenet.py:small_75 --workdir=DIR
Data:    imagenet2012 of TensorFlow Datasets as array_record files under $TFDS_DATA_DIR
Cost:    not run by us; 375,300 steps at batch 1,024
Expect:  val/accuracy within 0.5 points of the numbers above (not measured by us)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

PRESETS = ("small_dense", "small_80", "small_75", "base_dense", "base_75", "base_50")
EPOCH = 1_281_167 // 1_024


def get_config(variant: str = "") -> Recipe:
    preset = variant or "small_75"
    if preset not in PRESETS:
        raise RecipeError(f"unknown preset {variant!r}: {nearest(variant, PRESETS)}")
    return Recipe(
        seed=0,
        steps=300 * EPOCH,
        batch=1_024,
        model={"name": "moh", "preset": preset, "dtype": "bfloat16"},
        task={"name": "classification", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        data=Data(
            source={"name": "tfds", "dataset": "imagenet2012", "split": "train"},
            pipeline={"name": "image_train", "size": 224},
            workers=16,
        ),
        optim=Optim(
            lr=1e-3,
            warmup=5 * EPOCH,
            warmup_lr=1e-6,
            end_lr=1e-5,
            weight_decay=0.05,
            no_decay=("query_embedding", "near_bias", "position_bias", "temperature"),
            clip=1.0,
        ),
        evals={
            "val": Evaluation(
                data=Data(
                    source={"name": "tfds", "dataset": "imagenet2012", "split": "validation"},
                    pipeline={"name": "image_eval", "size": 224, "crop_ratio": 0.875},
                    workers=16,
                ),
                every=5 * EPOCH,
            )
        },
        checkpoint=Checkpoint(every=EPOCH, keep=2, best="val/accuracy"),
        report=Report(every=100),
    )
