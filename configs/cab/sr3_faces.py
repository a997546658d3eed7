# SPDX-License-Identifier: Apache-2.0
"""SR3 on faces, 16 x 16 to 128 x 128: trained on FFHQ, evaluated on 100 pictures of CelebA-HQ.

The variant is an attention, which CAB puts between the pixels of 128 x 128, too, but for softmax.
Others than the variants: --config.model.attention=NAME. CAB evaluates the mean of the last five
checkpoints: python -m launch.evaluate --workdir=DIR --last=5

Run:     python -m launch.train --config=configs/cab/sr3_faces.py:local --workdir=DIR
         --config.data.source.root=ROOT --config.evals.val.data.source.root=ROOT
Data:    data/ffhq_16_128 and data/celebahq_16_128 or the roots given, each with folders hr_128,
         lr_16 and sr_16_128 of PNG files, as the public code of SR3 prepares them
Cost:    not measured by us; CAB uses one A100 of 80 GB
Expect:  with --last=5 val/psnr 23.33, val/ssim 0.682 for local attention (CAB's table; softmax in
         its flash form 21.82, 0.583); not measured by us
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("softmax", "local")


def get_config(variant: str = "") -> Recipe:
    attention = variant or "softmax"
    if attention not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    faces = lambda root, **options: {
        "name": "picture_folders", "root": f"data/{root}", "small": 16, "large": 128,
        **options,
    }  # fmt: skip
    validation = Data(
        source=faces("celebahq_16_128", limit=100), pipeline={"name": "picture_pairs"}
    )
    return Recipe(
        seed=0,
        steps=1_000_000,
        batch=4,
        model={"name": "sr3", "preset": "16-128", "attention": attention},
        task={"name": "super_resolution"},
        data=Data(
            source=faces("ffhq_16_128"),
            pipeline={"name": "picture_pairs", "flip": 0.5},
            workers=8,
        ),
        optim=Optim(name="adamw", lr=1e-4, decay="constant"),
        evals={"val": Evaluation(data=validation, every=50_000)},
        checkpoint=Checkpoint(every=50_000, keep=5),
        report=Report(every=200, samples=0),
    )
