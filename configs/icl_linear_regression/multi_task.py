# SPDX-License-Identifier: Apache-2.0
"""Two regressions in one prompt, which read four of six coordinates each and share two.

Four heads divide into two pairs of opposite ones, a pair for each task; three heads share.
Variants: two_heads, three_heads, four_heads.

Run:     python -m launch.train --config=configs/icl_linear_regression/multi_task.py --workdir=DIR
         python -m launch.analyze --system=icl_linear_regression --measure=circuits --workdir=DIR
Data:    generated, no network
Cost:    two minutes on two CPU cores
Expect:  test/median_mse near 0.4, from 4.06 without a network
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = {"two_heads": 2, "three_heads": 3, "four_heads": 4}


def get_config(variant: str = "") -> Recipe:
    variant = variant or "four_heads"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    source = {"name": "regression_prompts", "dim": 6, "length": 48, "supports": (4, 4)}
    return Recipe(
        seed=0,
        steps=8_000,
        batch=4,
        model={
            "name": "regression_attention",
            "preset": "multi_task",
            "heads": VARIANTS[variant],
            "replicas": 5,
        },
        task={"name": "prompt_regression"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=3e-3, decay="constant"),
        evals={
            "test": Evaluation(data=Data(source={**source, "split": "test", "size": 320}), batch=32)
        },
        checkpoint=Checkpoint(every=2_000, keep=2),
        report=Report(every=20, tensorboard=False, samples=0),
    )
