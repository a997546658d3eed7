# SPDX-License-Identifier: Apache-2.0
"""DiT and MoH-DiT on latents of ImageNet-1k at 256 pixels, as arXiv 2410.11842 trains them.

The variant is a preset: s-2, b-2, l-2, xl-2 (dense) or moh-s-90, moh-s-75, .., moh-xl-75.

FID of 50,000 samples in the paper (dense / 90 % / 75 % of the heads): S 68.40/67.25/69.42, B
43.47/43.40/43.61, L 23.33/23.17/24.29 after 400,000 steps; XL 9.62 dense and 8.56 with 90 % after
7,000,000, and 3.22 and 2.94 with guidance 1.25. The FID needs a network of its own: sample with the
task's `predict`, decode, and measure outside. Give `task.guidance=1.25` for guided samples.

Latents are mirrored instead of pictures, which the autoencoder turns into almost the same.

Run:     python -m launch.train --config=configs/moh/dit_imagenet.py:moh-xl-90 --workdir=DIR
Data:    $IMAGENET_LATENTS/train/*.npz and $IMAGENET_LATENTS/val/*.npz, each with `latents`
         [n, 4, 32, 32] of Stable Diffusion's autoencoder (unscaled) and `labels` [n]; written with
         numpy.savez, they stay on disk
Cost:    not run by us; 400,000 steps of batch 256 (see launch.compile for memory and operations)
Expect:  the FIDs above (not measured by us)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

PRESETS = ("s-2", "b-2", "l-2", "xl-2", "moh-s-90", "moh-s-75", "moh-b-90", "moh-b-75", "moh-l-90",
           "moh-l-75", "moh-xl-90", "moh-xl-75")  # fmt: skip
SCALE = 0.18215
STEPS = {True: 7_000_000, False: 400_000}
"""Of models of the largest size, and of the others."""


def get_config(variant: str = "") -> Recipe:
    preset = variant or "moh-xl-90"
    if preset not in PRESETS:
        raise RecipeError(f"unknown variant {preset!r}: {nearest(preset, PRESETS)}")
    source = lambda split: {
        "name": "latent_files",
        "path": f"$IMAGENET_LATENTS/{split}",
        "scale": SCALE,
        "channels_first": True,
        "num_classes": 1_000,
    }
    return Recipe(
        seed=0,
        steps=STEPS["xl" in preset],
        batch=256,
        model={"name": "dit", "preset": preset, "dtype": "bfloat16", "remat": "dots"},
        task={"name": "class_diffusion", "sample_steps": 250},
        data=Data(source=source("train"), pipeline={"name": "pictures", "flip": 0.5}, workers=8),
        optim=Optim(name="adamw", lr=1e-4, decay="constant", ema=0.9999),
        evals={
            "val": Evaluation(
                data=Data(source=source("val"), pipeline={"name": "pictures"}), every=50_000
            )
        },
        checkpoint=Checkpoint(every=10_000, keep=2),
        report=Report(every=100, samples=0),
    )
