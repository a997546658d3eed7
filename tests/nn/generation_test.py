# SPDX-License-Identifier: Apache-2.0
"""Writing token by token, with a model whose next token is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.generation import generate

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


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT[:, :0], {}, "prompt"),
        (PROMPT, {"shortest": 4}, "shortest=4"),
        (PROMPT, {"temperature": 1.0}, "temperature=1.0"),
    ],
)
def test_impossible_requests_are_refused(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(successor, 0, prompt, 3, **options)
