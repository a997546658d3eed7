# SPDX-License-Identifier: Apache-2.0
"""ROUGE by hand: common words, pairs and subsequences of short texts."""

import sys

import pytest

from attnjax.errors import AttnjaxError
from attnjax.metrics.rouge import rouge


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(AttnjaxError, match=r"attnjax\[text\]"):
        rouge(["a"], ["a"])


@pytest.mark.parametrize("texts", [([], []), (["a"], [])])
def test_texts_that_do_not_pair_are_refused(texts):
    with pytest.raises(ValueError, match="references"):
        rouge(*texts)


def test_values_worked_out_by_hand():
    """Prediction of 4 words, reference of 5: three in common, one pair, two in order."""
    pytest.importorskip("rouge_score")
    prediction, reference = "the cat sat down", "sat the cat on mats"
    values = rouge([prediction, reference], [reference, reference], stemming=False)
    f = lambda common, ours, theirs: 2 * common / (ours + theirs)
    assert values["rouge1"] == pytest.approx(50 * (f(3, 4, 5) + 1))
    assert values["rouge2"] == pytest.approx(50 * (f(1, 3, 4) + 1))
    assert values["rougeL"] == pytest.approx(50 * (f(2, 4, 5) + 1))
