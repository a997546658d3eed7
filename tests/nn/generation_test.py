# SPDX-License-Identifier: Apache-2.0
"""Writing token by token, with a model whose next token is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.generation import beam_search, generate, keep_likeliest

PROMPT = np.array([[3, 4], [5, 6]], np.int32)


def successor(tokens, seen):
    """The next token is one more, modulo 8; the state counts the tokens read."""
    return 5.0 * jax.nn.one_hot((tokens + 1) % 8, 8), seen + 1


def test_greedy_continues_the_prompt():
    written = generate(successor, 0, PROMPT, 5)
    np.testing.assert_array_equal(written, [[5, 6, 7, 0, 1], [7, 0, 1, 2, 3]])


def test_texts_end_and_are_padded():
    written = generate(successor, 0, PROMPT, 5, end=6, padding=9)
    np.testing.assert_array_equal(written, [[5, 6, 9, 9, 9], [7, 0, 1, 2, 3]])


def test_the_end_may_not_come_too_early():
    """Ties then go to the first of the others, 0."""
    written = generate(successor, 0, PROMPT, 4, end=6, shortest=2)
    np.testing.assert_array_equal(written[0], [5, 0, 1, 2])


def test_draws_follow_the_temperature_and_the_key():
    flat = lambda tokens, state: (jnp.zeros((len(tokens), 8)), state)
    draws = [
        generate(flat, (), PROMPT, 40, temperature=1.0, key=jax.random.key(k)) for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any() and len(np.unique(draws[0])) == 8
    cold = generate(successor, 0, PROMPT, 5, temperature=0.01, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, generate(successor, 0, PROMPT, 5))


def test_unlikely_tokens_are_ruled_out():
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]]))
    kept = lambda **options: np.isfinite(keep_likeliest(logits, **options)).tolist()
    assert kept(top_k=1) == [[True, False, False, False], [True] * 4]
    assert kept(top_k=2) == [[True, False, True, False], [True] * 4]
    assert kept(top_p=0.5) == [[True, False, False, False], [True] * 4]
    assert kept(top_p=0.6) == [[True, False, True, False], [True] * 4]
    assert kept(top_p=1e-6)[0] == [True, False, False, False]
    assert kept(top_k=7) == kept() == [[True] * 4] * 2
    for options in ({"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="top_p"):
            keep_likeliest(logits, **options)


def test_draws_keep_to_what_is_likely():
    skewed = lambda tokens, state: (
        jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.3, 0.1])), (len(tokens), 3)), state
    )  # fmt: skip
    options = {"temperature": 1.0, "key": jax.random.key(0)}
    for limits, expected in (({}, {0, 1, 2}), ({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0})):
        drawn = generate(skewed, (), PROMPT % 3, 60, **options, **limits)
        assert set(np.unique(drawn)) == expected


def test_shorter_prompts_are_continued_as_if_alone():
    prompt, lengths = np.array([[3, 4, 5], [6, 0, 0], [1, 2, 0]], np.int32), np.array([3, 1, 2])
    written = generate(successor, 0, prompt, 4, lengths=lengths, end=0, padding=9)
    np.testing.assert_array_equal(written, [[6, 7, 0, 9], [7, 0, 9, 9], [3, 4, 5, 6]])

    def prefill(prompt, lengths, state):
        last = jnp.take_along_axis(prompt, lengths[:, None] - 1, axis=1)[:, 0]
        return successor(last, state)

    at_once = generate(successor, 0, prompt, 4, lengths=lengths, prefill=prefill, end=0, padding=9)
    np.testing.assert_array_equal(at_once, written)


def chain(tokens, state):
    """A Markov chain: logits of the next token are a row of the table in the state."""
    return state[0][tokens], state


def likelihoods(table, start, length, end):
    """All continuations with their log-likelihoods and numbers of tokens, best first."""
    log = np.asarray(jax.nn.log_softmax(table))
    found = {}
    for tokens in np.ndindex((len(table),) * length):
        score, count, last, kept = 0.0, 0, start, []
        for token in tokens:
            score, count, last = score + log[last, token], count + 1, token
            kept.append(token)
            if token == end:
                break
        found[tuple(kept)] = (score, count)
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_wide_enough_finds_the_best_of_all(penalty):
    table = jax.random.normal(jax.random.key(3), (4, 4)) * 2
    best = sorted(
        ((score / count**penalty, tokens)
         for tokens, (score, count) in likelihoods(table, 2, 3, end=1).items()), reverse=True,
    )  # fmt: skip
    prompt = np.array([[0, 2], [3, 2]], np.int32)
    state = (table, jnp.zeros(128))
    reorder = lambda state, rows: (state[0], state[1][rows])
    written, scores = beam_search(
        chain, state, prompt, 3, beams=64, reorder=reorder, end=1, padding=0,
        length_penalty=penalty,
    )  # fmt: skip
    for rank in range(3):
        score, tokens = best[rank]
        expected = [*tokens, *[0] * (3 - len(tokens))]
        np.testing.assert_array_equal(written[:, rank], [expected] * 2)
        np.testing.assert_allclose(scores[:, rank], score, rtol=1e-5)


def test_one_beam_is_greedy():
    table = jax.random.normal(jax.random.key(5), (6, 6))
    written, _ = beam_search(
        chain, (table,), PROMPT % 6, 5, beams=1, reorder=lambda state, rows: state
    )
    np.testing.assert_array_equal(written[:, 0], generate(chain, (table,), PROMPT % 6, 5))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT[:, :0], {}, "prompt"),
        (PROMPT, {"shortest": 4}, "shortest=4"),
        (PROMPT, {"temperature": 1.0}, "temperature=1.0"),
        (PROMPT, {"top_k": -1}, "top_k=-1"),
        (PROMPT, {"lengths": np.array([1])}, "lengths"),
        (PROMPT, {"lengths": np.array([0, 2])}, "from 1 to 2"),
    ],
)
def test_impossible_requests_are_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(successor, 0, prompt, 3, **options)
