# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a CrossViT trained at 240/224 pixels at 408/384: 15-dagger-384 or 18-dagger-384.

Position tables are interpolated when the weights are read. The variant is 15 or 18 (default).

Run:     python -m launch.train --config=configs/crossvit/finetune_384.py:18 --workdir=DIR
         --config.model.weights=<18-dagger weights>.safetensors
Data:    imagenet2012 of TensorFlow Datasets as array_record files under $TFDS_DATA_DIR; weights of
         the 224 preset, from a run of imagenet.py or from launch.convert
Cost:    not run by us; 75,060 steps at batch 512
Expect:  val/accuracy 0.838 (15), 0.842 (18) within 0.005, the released weights as timm measured
         them (not measured by us; we do not know the paper's schedule: this is DeiT's)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("15", "18")
IMAGES = 1_281_167


def get_config(variant: str = "") -> Recipe:
    depth = variant or "18"
    if depth not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    batch = 512
    epoch = IMAGES // 256 * 256 // batch
    return Recipe(
        seed=0,
        steps=30 * epoch,
        batch=batch,
        model={
            "name": "crossvit",
            "preset": f"{depth}-dagger-384",
            "weights": "",
            "drop_path": 0.1,
            "dtype": "bfloat16",
            "remat": "blocks",
        },
        task={"name": "classification", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        data=Data(
            source={"name": "tfds", "dataset": "imagenet2012", "split": "train"},
            pipeline={"name": "image_train", "size": 408},
            workers=16,
            repeats=3,
        ),
        optim=Optim(
            name="adamw",
            lr=5e-6 * batch / 512,
            decay="constant",
            weight_decay=1e-8,
            no_decay=("^cls_", "^positions_"),
        ),
        evals={
            "val": Evaluation(
                data=Data(
                    source={"name": "tfds", "dataset": "imagenet2012", "split": "validation"},
                    pipeline={"name": "image_eval", "size": 408, "crop_ratio": 1.0},
                    workers=16,
                ),
                every=epoch,
            )
        },
        checkpoint=Checkpoint(every=epoch // 2, keep=2, best="val/accuracy"),
        report=Report(every=100),
    )
