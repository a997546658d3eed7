# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of texts, with a decoder of random parameters."""

import functools
import sys
import types

import jax
import numpy as np
import pytest

from attnjax.benchmarks import multiple_choice
from attnjax.data.tokenizers import BEGIN, make_tokenizer
from attnjax.errors import RecipeError
from attnjax.models.decoder import Decoder
from attnjax.train.language_scorer import LanguageScorer, harness_model

RTOL = 1e-4


@pytest.fixture(scope="module")
def scorer():
    model = Decoder(vocab_size=260, width=16, heads=(2, 1), hidden=24, length=24)
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    params = jax.tree.map(lambda x: 4 * x, params)
    return LanguageScorer(model, params, make_tokenizer("bytes"), batch=3)


@functools.cache
def _forward(model):
    return jax.jit(lambda params, rows: jax.nn.log_softmax(model.apply(params, rows).logits))


def logs(scorer, tokens):
    """Log-probabilities `[24, v]`; what stands behind the tokens does not matter."""
    rows = np.pad(tokens, (0, 24 - len(tokens)))[None]
    return np.asarray(_forward(scorer.model)({"params": scorer.params}, rows)[0])


def by_hand(scorer, context, continuation):
    tokens = np.array([BEGIN, *(scorer.tokenizer.encode((context + continuation).encode()))])
    log = logs(scorer, tokens)
    count = len(continuation.encode())
    places = range(len(tokens) - count, len(tokens))
    best = all(int(np.argmax(log[i - 1])) == tokens[i] for i in places)
    return float(sum(log[i - 1, tokens[i]] for i in places)), best


def test_log_likelihoods_are_sums_over_the_continuation(scorer):
    pairs = [("abc", "d"), ("", "xyz"), ("a longer context", "!"), ("ab", "\u00e9"), ("q", "qq")]
    found = scorer.log_likelihoods(pairs)
    for pair, (value, best) in zip(pairs, found, strict=True):
        expected, expected_best = by_hand(scorer, *pair)
        np.testing.assert_allclose(value, expected, rtol=RTOL)
        assert best == expected_best
    assert scorer(pairs) == [value for value, _ in found]


@pytest.mark.slow
def test_greedy_continuations_are_the_likeliest(scorer):
    prompts = ["abc", "a much longer prompt than fits"]
    written = scorer.write(prompts, 5)
    assert written == [scorer.write([prompt], 5)[0] for prompt in prompts]
    first = written[0].encode()[:1].decode(errors="replace")
    if first.isascii() and first:
        assert scorer.log_likelihoods([("abc", first)])[0][1]
        assert scorer.write(["abc"], 5, until=[first]) == [""]
    with pytest.raises(ValueError, match="from 1 to 23"):
        scorer.write(["a"], 24)


def test_long_texts_are_read_in_windows(scorer):
    text = "0123456789" * 8
    (total,) = scorer.rolling([text])
    tokens = scorer.tokenizer.encode(text.encode())
    expected = 0.0
    for start in range(0, len(tokens), 23):
        window = np.array([tokens[start - 1] if start else BEGIN, *tokens[start : start + 23]])
        log = logs(scorer, window)
        expected += sum(log[i, window[i + 1]] for i in range(len(window) - 1))
    np.testing.assert_allclose(total, expected, rtol=RTOL)


def test_questions_are_answered(scorer):
    records = multiple_choice.generate(0, 5)
    answers = multiple_choice.predict(records, scorer)
    for record, answer in zip(records, answers, strict=True):
        values = [by_hand(scorer, record.context[-20:], choice)[0] for choice in record.choices]
        if len(record.context) <= 20:
            assert answer == int(np.argmax(values))
    assert 0 <= multiple_choice.score(answers, records).accuracy <= 1


def test_the_harness_gets_what_it_asks_for(scorer, monkeypatch):
    with pytest.raises(RecipeError, match="lm-eval"):
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
        harness_model(scorer)
    module = types.ModuleType("lm_eval.api.model")
    module.LM = object
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    model = harness_model(scorer)
    ask = lambda *args: types.SimpleNamespace(args=args)
    assert model.loglikelihood([ask("ab", "c")]) == scorer.log_likelihoods([("ab", "c")])
    assert model.loglikelihood_rolling([ask("abc")]) == scorer.rolling(["abc"])
    options = {"until": "\n", "max_gen_toks": 4}
    assert model.generate_until([ask("ab", options)]) == scorer.write(["ab"], 4, ["\n"])


def test_other_vocabularies_are_refused(scorer):
    for tokenizer in (
        make_tokenizer("bytes", 0),
        types.SimpleNamespace(vocab_size=300, reserved=4),
    ):
        with pytest.raises(RecipeError, match="does not fit a model of 260"):
            LanguageScorer(scorer.model, scorer.params, tokenizer)
