# SPDX-License-Identifier: Apache-2.0
"""The release's own training: Adam at 1e-3 for 500,001 steps, seed 1029; the variant is the heads.

arXiv 2503.12734, Section 3: 1, 2 (default), 4 or 8 heads.

Run:     python -m launch.train --config=configs/icl_linear_regression/published.py:2 --workdir=DIR
Data:    generated, no network
Cost:    not run by us; about an hour on two CPU cores
Expect:  omega near +-0.13 and mu near +-3.45 with two heads
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("1", "2", "4", "8")


def get_config(variant: str = "") -> Recipe:
    variant = variant or "2"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "regression_prompts", "size": 4_000_000}
    return Recipe(
        seed=1029,
        steps=500_001,
        batch=4,
        model={"name": "regression_attention", "heads": int(variant)},
        task={"name": "prompt_regression"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=1e-3, decay="constant"),
        evals={
            "test": Evaluation(
                data=Data(source={**source, "split": "test", "size": 320}), every=50_000, batch=32
            )
        },
        checkpoint=Checkpoint(every=50_000, keep=11),
        report=Report(every=100, tensorboard=False, samples=0),
    )
