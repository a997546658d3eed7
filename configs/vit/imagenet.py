# SPDX-License-Identifier: Apache-2.0
"""Vision transformers on ImageNet-1k with DeiT's recipe: 300 epochs, images of 224 pixels.

The variant is a preset. Top-1 of arXiv 2012.12877, Table 7: tiny 72.2, small 79.8, base 81.8 (with
stochastic depth, which this model does not have); large is not trained there.

Run:     python -m launch.train --config=configs/vit/imagenet.py:small --workdir=DIR
Data:    imagenet2012 of TensorFlow Datasets as array_record files under $TFDS_DATA_DIR
Cost:    not run by us; 375,300 steps at batch 1,024 (see launch.compile for memory and operations)
Expect:  val/accuracy within a point of the numbers above (not measured by us)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

PRESETS = ("tiny", "small", "base", "large")
BATCH = 1_024
EPOCH = 1_281_167 // 256 * 256 // BATCH


def get_config(variant: str = "") -> Recipe:
    preset = variant or "small"
    if preset not in PRESETS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, PRESETS)}")
    images = lambda split: {"name": "tfds", "dataset": "imagenet2012", "split": split}
    return Recipe(
        seed=0,
        steps=300 * EPOCH,
        batch=BATCH,
        model={"name": "vit", "preset": preset, "dtype": "bfloat16"},
        task={"name": "classification", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        data=Data(
            source=images("train"),
            pipeline={"name": "image_train", "size": 224},
            workers=16,
            repeats=3,
        ),
        optim=Optim(
            lr=5e-4 * BATCH / 512,
            warmup=5 * EPOCH,
            warmup_lr=1e-6,
            end_lr=1e-5,
            weight_decay=0.05,
            no_decay=("^cls$", "^positions$"),
        ),
        evals={
            "val": Evaluation(
                data=Data(
                    source=images("validation"),
                    pipeline={"name": "image_eval", "size": 224, "crop_ratio": 0.875},
                    workers=16,
                ),
                every=5 * EPOCH,
            )
        },
        checkpoint=Checkpoint(every=EPOCH, keep=2, best="val/accuracy"),
        report=Report(every=100),
    )
