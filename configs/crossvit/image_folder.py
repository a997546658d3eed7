# SPDX-License-Identifier: Apache-2.0
"""CrossViT on your own pictures: one folder per class under train/ and val/.

Set the root, the number of classes and the length on the command line. The variant is a preset
(default 9-dagger).

Run:     python -m launch.train --config=configs/crossvit/image_folder.py:9-dagger --workdir=DIR
         --config.data.source.root=ROOT --config.evals.val.data.source.root=ROOT
         --config.model.num_classes=37 --config.steps=20000
Data:    ROOT/train/<class>/<image>.jpeg and ROOT/val/<class>/<image>.jpeg (or png, webp, ...)
Cost:    hours on one GPU for 10,000 steps at batch 128, depending on the preset (not run by us)
Expect:  depends on the data; start from published weights with --config.model.weights=FILE
"""

from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    preset = variant or "9-dagger"
    size = 408 if preset.endswith("-384") else 240
    root = "data/images"
    return Recipe(
        seed=0,
        steps=10_000,
        batch=128,
        model={
            "name": "crossvit",
            "preset": preset,
            "weights": "",
            "num_classes": 1000,
            "drop_path": 0.1,
            "dtype": "bfloat16",
        },
        task={"name": "classification", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        data=Data(
            source={"name": "image_folder", "root": root, "split": "train"},
            pipeline={"name": "image_train", "size": size},
            workers=8,
        ),
        optim=Optim(
            name="adamw",
            lr=2.5e-4,
            warmup=500,
            warmup_lr=1e-6,
            end_lr=1e-5,
            weight_decay=0.05,
            no_decay=("^cls_", "^positions_"),
        ),
        evals={
            "val": Evaluation(
                data=Data(
                    source={"name": "image_folder", "root": root, "split": "val"},
                    pipeline={"name": "image_eval", "size": size},
                    workers=8,
                ),
                every=1_000,
            )
        },
        checkpoint=Checkpoint(every=1_000, keep=2, best="val/accuracy"),
        report=Report(every=50),
    )
