# SPDX-License-Identifier: Apache-2.0
"""CrossViT on ImageNet-1k with the paper's (DeiT's) recipe: 300 epochs and 10 of cool-down.

The variant is a preset, then options, such as "18-dagger", "15,ema" or "18-dagger-384,large_batch":
ema averages parameters (decay 0.99996); large_batch is the paper's multi-node form, 4,096 images a
step and 30 epochs of warm-up.

Top-1 / top-5 of the released weights as timm measured them (results-imagenet.csv): tiny
73.352/91.906, small 81.036/95.466, base 82.212/95.826, 9 73.994/91.976, 15 81.522/95.694, 18
82.390/96.064, 9-dagger 76.990/93.602, 15-dagger 82.302/95.960, 18-dagger 82.494/96.070,
15-dagger-384 83.842/96.786, 18-dagger-384 84.198/96.834 (the last two fine-tuned: see
finetune_384.py).

Run:     python -m launch.train --config=configs/crossvit/imagenet.py:18-dagger --workdir=DIR
Data:    imagenet2012 of TensorFlow Datasets as array_record files under $TFDS_DATA_DIR
Cost:    not run by us; 387,810 steps at batch 1,024 (see launch.compile for memory and operations)
Expect:  val/accuracy within 0.5 points of the numbers above (not measured by us)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

PRESETS = ("tiny", "small", "base", "9", "15", "18", "9-dagger", "15-dagger", "18-dagger",
           "15-dagger-384", "18-dagger-384")  # fmt: skip
OPTIONS = ("ema", "large_batch")
IMAGES = 1_281_167


def get_config(variant: str = "") -> Recipe:
    preset, *options = (variant or "18-dagger").split(",")
    if preset not in PRESETS:
        raise RecipeError(f"unknown variant {preset!r}: {nearest(preset, PRESETS)}")
    for option in options:
        if option not in OPTIONS:
            raise RecipeError(f"unknown option {option!r}: {nearest(option, OPTIONS)}")
    batch, warmup = (4_096, 30) if "large_batch" in options else (1_024, 5)
    # An epoch of repeated augmentation has as many images as the data, rounded down to 256.
    epoch = IMAGES // 256 * 256 // batch
    size, crop = (408, 1.0) if preset.endswith("-384") else (240, 0.875)
    return Recipe(
        seed=0,
        steps=310 * epoch,
        batch=batch,
        model={"name": "crossvit", "preset": preset, "drop_path": 0.1, "dtype": "bfloat16"},
        task={"name": "classification", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        data=Data(
            source={"name": "tfds", "dataset": "imagenet2012", "split": "train"},
            pipeline={"name": "image_train", "size": size},
            workers=16,
            repeats=3,
        ),
        optim=Optim(
            name="adamw",
            lr=5e-4 * batch / 512,
            warmup=warmup * epoch,
            warmup_lr=1e-6,
            end_lr=1e-5,
            cooldown=10 * epoch,
            weight_decay=0.05,
            no_decay=("^cls_", "^positions_"),
            ema=0.99996 if "ema" in options else 0.0,
        ),
        evals={
            "val": Evaluation(
                data=Data(
                    source={"name": "tfds", "dataset": "imagenet2012", "split": "validation"},
                    pipeline={"name": "image_eval", "size": size, "crop_ratio": crop},
                    workers=16,
                ),
                every=5 * epoch,
            )
        },
        checkpoint=Checkpoint(every=epoch, keep=2, best="val/accuracy"),
        report=Report(every=100),
    )
