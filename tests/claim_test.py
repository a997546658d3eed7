# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of claims, against numbers worked out by hand."""

import dataclasses

import pytest

from attnjax import claim as claim_lib
from attnjax.claim import Arm, Claim, Condition
from attnjax.errors import RecipeError

SMOKE = "configs/crossvit/smoke.py"
CLAIM = Claim(
    statement="a beats b",
    baseline="b",
    arms={"a": Arm(SMOKE, "test/accuracy"), "b": Arm(SMOKE, "test/accuracy", {"optim.lr": 1e-4})},
    conditions=(Condition("a", ">=", 0.9), Condition("a - b", ">", 0.2)),
    effect="a - b",
)


def test_effect_is_the_mean_paired_difference_and_spread_its_deviation():
    record = claim_lib.judge(CLAIM, {"a": [0.9, 1.0, 0.95], "b": [0.5, 0.4, 0.6]})
    # differences 0.4, 0.6, 0.35: mean 0.45, sample variance (0.05^2 + 0.15^2 + 0.1^2) / 2
    assert record["effect"] == pytest.approx(0.45)
    assert record["spread"] == pytest.approx(0.0175**0.5, abs=1e-6)
    assert record["mean"] == {"a": 0.95, "b": 0.5}
    assert record["holds"] is True
    assert record["conditions"][1]["measured"] == pytest.approx([0.4, 0.6, 0.35])


def test_one_bad_seed_is_enough_to_fail():
    record = claim_lib.judge(CLAIM, {"a": [1.0, 0.89, 1.0], "b": [0.0, 0.0, 0.0]})
    assert record["holds"] is False
    assert [c["holds"] for c in record["conditions"]] == [False, True]


def test_diverged_run_meets_no_condition():
    record = claim_lib.judge(CLAIM, {"a": [float("nan")], "b": [0.1]})
    assert record["holds"] is False


def test_single_seed_has_no_spread():
    assert claim_lib.judge(CLAIM, {"a": [1.0], "b": [0.5]})["spread"] == 0.0


def test_arm_applies_overrides_and_seed():
    recipe = CLAIM.arms["b"].recipe(seed=7)
    assert (recipe.seed, recipe.optim.lr) == (7, 1e-4)
    assert CLAIM.arms["a"].recipe(seed=7).optim.lr != 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.lrr": 1.0}, "did you mean 'lr'"),
        ({"optm.lr": 1.0}, "did you mean 'optim'"),
        ({"model.dimms": (8, 8)}, "did you mean 'dims'"),
        ({"evals.tset.every": 1}, "did you mean 'test'"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        Arm(SMOKE, "test/accuracy", overrides).recipe(seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"effect": "a - c"}, "unknown arm 'c'"),
        ({"effect": "a - b - a"}, "difference of two"),
        ({"conditions": (Condition("aa", ">=", 1.0),)}, "unknown arm 'aa'"),
        ({"conditions": (Condition("a", "=", 1.0),)}, "operator '='"),
        ({"conditions": ()}, "at least one condition"),
        ({"arms": {**CLAIM.arms, "b": Arm(SMOKE, "tset/accuracy")}}, "did you mean 'test'"),
        ({"arms": {**CLAIM.arms, "b": Arm("configs/none.py", "test/accuracy")}}, "no config file"),
    ],
)
def test_wrong_claims_are_refused(change, message):
    CLAIM.validate()
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(CLAIM, **change).validate()


def test_system_without_a_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_lib.recipe_lib, "folder", lambda: tmp_path)
    with pytest.raises(RecipeError, match="states no claim"):
        claim_lib.load("crossvit")
