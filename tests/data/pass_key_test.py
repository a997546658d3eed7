# SPDX-License-Identifier: Apache-2.0
"""Pass-key prompts: what they say, what is to be predicted, what does not fit."""

import re

import numpy as np
import pytest

from attnjax.data.pass_key import FILLER, LARGEST, PassKey
from attnjax.errors import RecipeError

PATTERN = re.compile(
    r"One important .* asked for\.\n(.*)\nThe pass key is (\d+)\. Remember it\. (\d+) is the pass "
    r"key\.\n(.*)\nWhat is the pass key\? The pass key is (\d+)\."
)

PATTERN_WITHOUT = (
    "One important fact is hidden in a long text without interest. Find it and keep it in mind: it "
    "will be asked for.\n\nThe pass key is . Remember it.  is the pass key.\n\n"
    "What is the pass key? The pass key is ."
)


@pytest.mark.parametrize(("length", "filler"), [(320, -1), (500, 100)])
def test_prompts_say_the_number_and_ask_for_it(length, filler):
    source, fillers, befores = PassKey(length=length, filler=filler), set(), set()
    for index in range(20):
        row = source[index]
        assert row["tokens"].shape == row["scored"].shape == (length,)
        end = int(np.flatnonzero(row["scored"])[-1]) + 1
        assert not row["tokens"][end:].any()
        before, first, second, after, answer = PATTERN.fullmatch(
            bytes(row["tokens"][:end].astype(np.uint8)).decode()
        ).groups()
        assert first == second == answer and 1 <= int(answer) <= LARGEST
        scored = bytes(row["tokens"][row["scored"]].astype(np.uint8)).decode()
        assert scored == f" {answer}."
        endless = " ".join([FILLER] * 9)
        assert endless.startswith(before) and endless.startswith(after)
        fillers.add(len(before) + len(after))
        befores.add(len(before))
        np.testing.assert_array_equal(
            row["tokens"], PassKey(length=length, filler=filler)[index]["tokens"]
        )
    again = PassKey(length=length, filler=filler)[19]
    np.testing.assert_array_equal(row["tokens"], again["tokens"])
    assert len(befores) > 10 and len(fillers) == 1
    assert filler in (-1, *fillers)
    if filler == -1:  # Nothing more would fit behind the longest number.
        assert fillers.pop() == length - 5 * 3 - len(PATTERN_WITHOUT)


def test_splits_differ_and_what_does_not_fit_is_refused():
    train, test = PassKey(length=400), PassKey("test", length=400)
    assert any((train[i]["tokens"] != test[i]["tokens"]).any() for i in range(3))
    with pytest.raises(RecipeError, match=r"source\.length=200: .* 0 characters"):
        PassKey(length=200)
    with pytest.raises(RecipeError, match=r"source\.length=400: .* 300 characters"):
        PassKey(length=400, filler=300)
    with pytest.raises(RecipeError, match=r"source\.filler=-2"):
        PassKey(filler=-2)
