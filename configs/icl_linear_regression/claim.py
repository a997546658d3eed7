# SPDX-License-Identifier: Apache-2.0
"""The claim of in-context linear regression: opposite heads come to a debiased gradient step.

Every arm trains eleven networks side by side and takes their median, because single networks may
stay where both heads have one sign (9 of 40 did, seed 100, 1,500 steps). Errors hardly change after
1,500 of the 8,000 steps of the recipe.
"""

from attnjax.claim import Arm, Claim, Condition

RECIPE = "configs/icl_linear_regression/single_task.py"


def get_claim() -> Claim:
    arm = lambda variant, metric: Arm(
        f"{RECIPE}:{variant}", metric, {"steps": 2_000, "model.replicas": 11}
    )
    return Claim(
        statement="Two heads of softmax attention become opposite, with diagonal KQ circuits and "
        "OV circuits that sum to nothing, and beat one head; four heads are no better; errors fall "
        "with more examples than there were in training.",
        baseline="The same layer with one head.",
        arms={
            "one_head": arm("one_head", "test/median_mse"),
            "two_heads": arm("two_heads", "test/median_mse"),
            "two_heads_100": arm("two_heads", "long/median_mse"),
            "opposite": arm("two_heads", "test/opposite"),
            "diagonal": arm("two_heads", "test/diagonal_ratio"),
            "imbalance": arm("two_heads", "test/imbalance"),
            "four_heads": arm("four_heads", "test/median_mse"),
        },
        conditions=(
            Condition("two_heads", "<=", 0.27),
            Condition("one_head - two_heads", ">=", 0.11),
            Condition("four_heads - two_heads", "<=", 0.02),
            Condition("two_heads - four_heads", "<=", 0.02),
            Condition("two_heads - two_heads_100", ">=", 0.03),
            Condition("opposite", ">", 0.5),
            Condition("diagonal", ">=", 0.98),
            Condition("imbalance", "<", 0.05),
        ),
        effect="one_head - two_heads",
    )
