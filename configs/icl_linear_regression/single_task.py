# SPDX-License-Identifier: Apache-2.0
"""One layer of attention on prompts of 40 examples in 5 dimensions: five networks side by side.

The quick protocol: Adam at 3e-3 for 8,000 steps of 256 prompts. Variants: one_head, two_heads,
three_heads, four_heads, eight_heads; linear_mean and linear_sum, one head without softmax, whose
sum is divided by the number of examples, or by 40 whatever that is; correlated, two heads and
coordinates with the covariance 0.5^|i-j|.

Run:     python -m launch.train --config=configs/icl_linear_regression/single_task.py --workdir=DIR
         python -m launch.analyze --system=icl_linear_regression --measure=circuits --workdir=DIR
Data:    generated, no network
Cost:    a minute on two CPU cores
Expect:  test/median_mse 0.40 with one head, 0.245 with more, at 40 examples
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = {
    "one_head": {"heads": 1},
    "two_heads": {"heads": 2},
    "three_heads": {"heads": 3},
    "four_heads": {"heads": 4},
    "eight_heads": {"heads": 8},
    "linear_mean": {"heads": 1, "kernel": "linear_mean"},
    "linear_sum": {"heads": 1, "kernel": "linear_sum"},
    "correlated": {"heads": 2},
}


def get_config(variant: str = "") -> Recipe:
    variant = variant or "two_heads"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    correlation = 0.5 if variant == "correlated" else 0.0
    source = {"name": "regression_prompts", "correlation": correlation}
    test = lambda length: Evaluation(
        data=Data(source={**source, "split": "test", "size": 320, "length": length}), batch=32
    )
    return Recipe(
        seed=0,
        steps=8_000,
        batch=4,
        model={"name": "regression_attention", "replicas": 5, **VARIANTS[variant]},
        task={"name": "prompt_regression"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=3e-3, decay="constant"),
        evals={"test": test(40), "short": test(10), "long": test(100)},
        checkpoint=Checkpoint(every=2_000, keep=2),
        report=Report(every=20, tensorboard=False, samples=0),
    )
