# SPDX-License-Identifier: Apache-2.0
"""What is hidden from masked language models: how much, how, and when it changes."""

import numpy as np
import pytest

from attnjax.data.masking import MaskTokens, mask_tokens
from attnjax.errors import RecipeError

OPTIONS = {"vocab_size": 260}


def draw(t=20_000, seed=0):
    return np.random.default_rng(seed).integers(4, 260, size=t).astype(np.int32)


def test_shares_of_the_paper():
    tokens = draw()
    hidden, scored = mask_tokens(tokens, np.random.default_rng(1), **OPTIONS)
    assert scored.dtype == bool and hidden.dtype == np.int32
    assert scored.mean() == pytest.approx(0.15, abs=1e-4)
    np.testing.assert_array_equal(hidden[~scored], tokens[~scored])
    is_mask, is_same = hidden[scored] == 3, hidden[scored] == tokens[scored]
    # 3,000 are to be guessed: one standard deviation of a share is 0.7 %.
    assert is_mask.mean() == pytest.approx(0.8, abs=0.025)
    assert is_same.mean() == pytest.approx(0.1, abs=0.02)
    replaced = hidden[scored][~is_mask & ~is_same]
    assert replaced.min() >= 4 and replaced.max() < 260 and len(np.unique(replaced)) > 100


def test_reserved_tokens_stay_and_something_is_always_hidden():
    tokens = np.array([1, 9, 2, 0, 0], np.int32)
    for seed in range(20):
        hidden, scored = mask_tokens(tokens, np.random.default_rng(seed), **OPTIONS)
        assert scored.tolist() == [False, True, False, False, False]
        np.testing.assert_array_equal(hidden[[0, 2, 3, 4]], [1, 2, 0, 0])
    nothing = mask_tokens(np.zeros(3, np.int32), np.random.default_rng(0), **OPTIONS)
    assert not nothing[1].any()


def test_training_draws_anew_and_evaluation_does_not():
    pipeline, example = MaskTokens(**OPTIONS), {"tokens": draw(200), "segments": np.ones(200)}
    first = pipeline(example, np.random.default_rng(0))
    assert set(first) == {"tokens", "target", "scored"}
    np.testing.assert_array_equal(first["target"], example["tokens"])
    again, other = (pipeline(example, np.random.default_rng(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(first["scored"], again["scored"])
    assert (first["scored"] != other["scored"]).any()
    fixed = [pipeline(example)["tokens"] for _ in range(2)]
    np.testing.assert_array_equal(*fixed)
    assert (MaskTokens(**OPTIONS, seed=1)(example)["tokens"] != fixed[0]).any()
    different = pipeline({"tokens": draw(200, seed=1)})["scored"]
    assert (different != pipeline(example)["scored"]).any()


@pytest.mark.parametrize("options", [{"rate": 1.0}, {"mask": 260}, {"reserved": -1}], ids=str)
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError, match=f"pipeline.{next(iter(options))}"):
        MaskTokens(**OPTIONS, **options)
