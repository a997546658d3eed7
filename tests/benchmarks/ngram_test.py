# SPDX-License-Identifier: Apache-2.0
"""N-grams against a slow definition."""

import collections

import numpy as np
import pytest

from attnjax.benchmarks.ngram import DISCOUNT, NGram


def by_hand(documents, order, size, context, token):
    """Kneser-Ney's probability of a token, by counting lists."""

    def grams(n):
        if n == order:
            return collections.Counter(
                tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1)
            )
        inner = collections.Counter(gram[1:] for gram in grams(n + 1))
        starts = {
            (number, tuple(d[i : i + n]))
            for number, d in enumerate(documents)
            for i in range(min(len(d), order - 1) - n + 1)
        }
        return inner + collections.Counter(gram for _, gram in starts)

    p = 1 / size
    for n in range(1, order + 1):
        counted, history = grams(n), tuple(context[len(context) - n + 1 :])
        if n - 1 > len(context):
            break
        own = {gram: c for gram, c in counted.items() if gram[:-1] == history}
        if own:
            total = sum(own.values())
            kept = max(own.get((*history, token), 0) - DISCOUNT, 0)
            p = (kept + DISCOUNT * len(own) * p) / total
    return p


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_are_those_of_the_definition(order):
    rng = np.random.default_rng(order)
    documents = [rng.integers(0, 4, size).tolist() for size in (1, 30, 12)]
    model = NGram(documents, order, 4)
    text = rng.integers(0, 4, 9).tolist()
    found = model.probabilities(np.array(text))
    for i, token in enumerate(text):
        expected = by_hand(documents, order, 4, text[:i], token)
        np.testing.assert_allclose(found[i], expected, rtol=1e-12)


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    model = NGram([rng.integers(0, 5, 200)], 3, 5)
    for context in ([], [1], [1, 2], [4, 4, 4, 4]):
        total = sum(model.probabilities(np.array([*context, token]))[-1] for token in range(5))
        np.testing.assert_allclose(total, 1)


def test_longer_contexts_help_where_text_repeats():
    text = np.tile(np.arange(7), 40)
    bits = [NGram([text], n, 7).bits_per_token([text[:70]]) for n in (1, 2)]
    assert bits[0] > 2.7 and bits[1] < 0.2


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="order=0"):
        NGram([np.zeros(3, int)], 0)
    with pytest.raises(ValueError, match="63 bits"):
        NGram([np.zeros(3, int)], 8, 300)
    with pytest.raises(ValueError, match="from 0 to 3"):
        NGram([np.array([4])], 2, 4)
    with pytest.raises(ValueError, match="no token"):
        NGram([np.array([], int)], 2, 4)
