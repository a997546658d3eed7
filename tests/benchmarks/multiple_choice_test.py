# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: files, an oracle, a null model, lengths."""

import json

import pytest

from attnjax.benchmarks.multiple_choice import Record, generate, load, predict, score
from attnjax.errors import RecipeError


def oracle(pairs):
    """Knows that the digit after the asked letter is right."""
    found = []
    for context, choice in pairs:
        told, _, asked = context.rpartition(" ")
        found.append(0.0 if asked + choice in told.split() else -1.0)
    return found


def test_an_oracle_is_right_and_a_null_model_is_at_chance():
    records = generate(0, 400)
    best = score(predict(records, oracle), records)
    assert best.accuracy == 1 and best.error == 0 and best.count == 400
    null = score(predict(records, lambda pairs: [0.0] * len(pairs)), records)
    assert null.chance == 0.25 and abs(null.accuracy - 0.25) < 3 * 0.022
    assert generate(0, 3) == generate(0, 3) != generate(1, 3)


def test_likelihoods_may_be_compared_per_byte():
    record = Record("", ("long one", "short"), 0)
    by_length = lambda pairs: [-1.0 * len(choice) ** 0.5 for _, choice in pairs]
    assert predict([record], by_length) == [1]
    assert predict([record], by_length, per_byte=True) == [0]
    with pytest.raises(ValueError, match="1 log-likelihoods for 2"):
        predict([record], lambda pairs: [0.0])
    with pytest.raises(ValueError, match="0 predictions for 1"):
        score([], [record])


def test_files_are_read_strictly(tmp_path):
    path = tmp_path / "tasks.jsonl"
    good = {"context": "a", "choices": ["b", "c"], "gold": 1, "source": "ignored"}
    path.write_text(json.dumps(good) + "\n\n")
    assert load(path) == [Record("a", ("b", "c"), 1)]
    for change in (
        {"gold": 2}, {"gold": True}, {"gold": "1"}, {"choices": ["b"]}, {"choices": ["b", ""]},
        {"choices": "bc"}, {"choices": ["b", 3]}, {"context": None},
    ):  # fmt: skip
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        with pytest.raises(RecipeError, match=r"tasks\.jsonl:2: no question"):
            load(path)
    path.write_text("\n")
    with pytest.raises(RecipeError, match=r"tasks\.jsonl: no question"):
        load(path)
    with pytest.raises(RecipeError, match="no file"):
        load(tmp_path / "absent.jsonl")
