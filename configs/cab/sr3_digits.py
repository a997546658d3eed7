# SPDX-License-Identifier: Apache-2.0
"""SR3 on pictures that are on every machine: digits, 4 x 4 to 8 x 8, or photographs, 16 to 64.

Settings of CAB's run on faces, smaller and with a larger learning rate. The variant is the data.
Any attention: --config.model.attention=NAME.

Run:     python -m launch.train --config=configs/cab/sr3_digits.py --workdir=DIR
Data:    bundled with scikit-learn, no network; 1,437 digits train, 360 test
Cost:    about two minutes on two shared CPU cores; photographs about 25 (7 examples/s)
Expect:  digits test/psnr above 17 and test/ssim above 0.85 (seed 0: softmax 18.3 and 0.90, local
         18.4 and 0.90), against 13.2 and 0.58 of the bicubic filter (test/low_psnr,
         test/low_ssim); photographs not measured
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("digits", "photos")


def get_config(variant: str = "") -> Recipe:
    kind = variant or "digits"
    if kind not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    is_small = kind == "digits"
    source = {"name": "digit_pairs" if is_small else "photo_pairs"}
    test = Data(source={**source, "split": "test"}, pipeline={"name": "picture_pairs"})
    return Recipe(
        seed=0,
        steps=600,
        batch=64 if is_small else 16,
        model={"name": "sr3", "preset": "4-8" if is_small else "16-64", "attention": "softmax"},
        task={
            "name": "super_resolution",
            "sample_steps": 50,
            "ssim_window": 7 if is_small else 11,
        },
        data=Data(
            source={**source, "split": "train"},
            pipeline={"name": "picture_pairs", "flip": 0.0 if is_small else 0.5},
        ),
        optim=Optim(name="adamw", lr=1e-3, decay="constant"),
        evals={"test": Evaluation(data=test, batch=120 if is_small else 18)},
        checkpoint=Checkpoint(every=100, keep=5),
        report=Report(every=50, samples=0),
    )
