# SPDX-License-Identifier: Apache-2.0
"""Two heads, two networks, a few hundred steps: the loss falls below that of predicting nothing.

Run:     python -m launch.train --config=configs/icl_linear_regression/smoke.py --workdir=DIR
Data:    generated, no network
Cost:    seconds on two CPU cores
Expect:  test/median_mse below 0.9
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: smoke.py has none")
    source = {"name": "regression_prompts", "length": 20, "prompts": 16}
    return Recipe(
        seed=0,
        steps=200,
        batch=8,
        model={"name": "regression_attention", "length": 20, "prompts": 16, "replicas": 2},
        task={"name": "prompt_regression"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=1e-2, decay="constant"),
        evals={"test": Evaluation(data=Data(source={**source, "split": "test", "size": 64}))},
        checkpoint=Checkpoint(every=200, keep=1),
        report=Report(every=50, tensorboard=False, samples=0),
    )
