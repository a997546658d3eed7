# SPDX-License-Identifier: Apache-2.0
"""The claim of LongCA-bench: a measurement that trains nothing, and what it measures."""

import numpy as np
import pytest

from attnjax import claim as claim_lib
from attnjax.benchmarks.long_context import claim, layouts
from attnjax.claim import Measurement
from attnjax.errors import RecipeError
from attnjax.train import claim as measurement


def test_claim_is_valid():
    made = claim_lib.load("long_context_bench").validate()
    assert made.seeds == 3
    for arm in made.arms.values():
        assert arm.make().ranks == 64


@pytest.fixture
def contiguous(monkeypatch):
    """Every placement is contiguous, but the balanced one, which is a zig-zag."""

    def place(name, drawn, ranks, chunk):
        if name != "balanced":
            return np.arange(drawn.total).reshape(ranks, -1)
        chunks = np.arange(drawn.total).reshape(2 * ranks, -1)
        return np.concatenate([chunks[:ranks], chunks[::-1][:ranks]], axis=1)

    monkeypatch.setattr(layouts, "place", place)


def test_measured_by_hand(contiguous):
    n = 8
    make = lambda name: claim.PlacementBalance("causal", name, ranks=n, tokens_per_rank=64)
    assert make("balanced")(seed=0) == 1.0
    assert make("contiguous")(seed=0) == pytest.approx(2 - 1 / n, abs=1e-2)


def test_worst_of_the_draws_counts(contiguous):
    options = dict(pattern="share_question", placement="contiguous", ranks=4, tokens_per_rank=512)
    one, five = (claim.PlacementBalance(**options, draws=draws) for draws in (1, 5))
    assert one(seed=3) == one(seed=3) != one(seed=4)
    assert five(seed=3) >= one(seed=3)


def test_record(contiguous, monkeypatch):
    options = {"pattern": "causal", "ranks": 4, "tokens_per_rank": 32, "draws": 1}
    made = claim_lib.Claim(
        statement="s",
        baseline="b",
        arms={
            name: Measurement("placement_balance", {**options, "placement": name})
            for name in ("balanced", "contiguous")
        },
        conditions=(claim_lib.Condition("balanced - contiguous", "<", 0.0),),
        effect="contiguous - balanced",
    )
    monkeypatch.setattr(claim_lib, "load", lambda slug: made)
    record = measurement.measure("long_context_bench")
    assert record["holds"] and record["per_seed"]["balanced"] == [1.0] * 3
    assert record["effect"] == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("placement_balanc", {}, "did you mean 'placement_balance'"),
        ("placement_balance", {"patern": "causal"}, "did you mean 'pattern'"),
        ("placement_balance", {"pattern": "causl", "placement": "zigzag"}, "pattern 'causl'"),
        ("placement_balance", {"pattern": "causal", "placement": "zig"}, "placement 'zig'"),
        (
            "placement_balance",
            {"pattern": "causal", "placement": "zigzag", "ranks": 0},
            "ranks=0",
        ),
        (
            "placement_balance",
            {"pattern": "causal", "placement": "zigzag", "distribution": "pyle"},
            "distribution 'pyle'",
        ),
    ],
)
def test_wrong_measurements_are_refused(name, options, message):
    with pytest.raises(RecipeError, match=message):
        Measurement(name, options).make()


def test_with_the_real_layouts():
    """On few ranks; the claim is measured by `launch.claims`.

    Here documents are long beside 2 ranks, and the zig-zag of each is even enough: what must be
    less even is the zig-zag of the whole.
    """
    measured = {
        (pattern, name): claim.PlacementBalance(
            pattern, name, ranks=8, tokens_per_rank=4096, draws=2
        )(seed=0)
        for pattern, name in (
            ("causal", "zigzag"),
            ("causal", "contiguous"),
            ("share_question", "balanced"),
            ("share_question", "zigzag"),
            ("prefix_lm_document", "balanced"),
            ("prefix_lm_document", "zigzag"),
        )
    }
    assert measured["causal", "zigzag"] == 1.0
    assert measured["causal", "contiguous"] == pytest.approx(2 - 1 / 8, abs=1e-3)
    for pattern in ("share_question", "prefix_lm_document"):
        assert 1 <= measured[pattern, "balanced"] < measured[pattern, "zigzag"]
