# SPDX-License-Identifier: Apache-2.0
"""CrossViT where only exchange between the branches can help: label = XOR of one bit per branch.

A late ensemble of isolated branches is additive in the two bits and cannot exceed 75 % accuracy;
class-token cross-attention can be right every time. Variants: cross, none (two token sets), and
images, images_none (one bit in fine texture, one in coarse shade; each branch sees its own band).

Run:     python -m launch.train --config=configs/crossvit/information_exchange.py --workdir=DIR
Data:    generated, no network
Cost:    about a minute on two CPU cores (images: several)
Expect:  test/accuracy >= 0.95 for cross and images, <= 0.78 for none and images_none
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("cross", "none", "images", "images_none")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "cross"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    with_images = variant.startswith("images")
    source = "information_exchange_images" if with_images else "information_exchange"
    model = {
        "name": "crossvit",
        "num_classes": 2,
        # Without images: 16 fine patches of 4 x 4 x 3 values and 4 coarse ones of 8 x 8 x 3.
        "image_size": (48, 48) if with_images else (16, 16),
        "patch_size": (12, 16) if with_images else (4, 8),
        "stem": "linear" if with_images else "patches",
        "dims": (32, 64),
        "depth": ((1, 1, 0),) * 2,
        "num_heads": (4, 4),
        "mlp_ratio": (2.0, 2.0),
        "fusion": "none" if variant.endswith("none") else "cross",
    }
    if with_images:
        model["branch_filters"] = ("highpass", "lowpass")
    return Recipe(
        seed=0,
        steps=1_500,
        batch=64,
        model=model,
        task={"name": "classification"},
        data=Data(source={"name": source, "split": "train"}),
        optim=Optim(lr=1e-3, decay="constant"),
        evals={
            "test": Evaluation(
                data=Data(source={"name": source, "split": "test", "size": 2_048}), batch=256
            )
        },
        checkpoint=Checkpoint(every=500, keep=1),
        report=Report(every=100, samples=4 if with_images else 0),
    )
