# SPDX-License-Identifier: Apache-2.0
"""ProbSparse: which rows are exact, what is drawn, and that padding draws nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, efficient

B, T, N, H = 2, 40, 2, 4
SAME = 1e-5


def draw(t=T):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (B, t, N, H)) for k in keys]


def test_numbers_of_samples_and_rows():
    made = efficient.make("prob_sparse", factor=5)
    lengths = [*range(2, 3000), 8103, 8104, 22_026, 22_027, 59_874, 59_875, 1_000_000]
    expected = [min(length, 5 * math.ceil(math.log(length))) for length in lengths]
    assert [made.count(length) for length in lengths] == expected
    np.testing.assert_array_equal(made.count(jnp.array(lengths)), expected)
    assert made.count(1) == 1


def test_rows_are_exact_or_the_mean():
    heads = draw()
    made = efficient.make("prob_sparse", factor=2)
    found = np.asarray(jax.jit(made.attend)({}, *heads))
    exact, mean = np.asarray(attention(*heads)), np.asarray(heads[2]).mean(axis=1)
    is_exact = abs(found - exact).max(axis=-1) < SAME
    is_mean = abs(found - mean[:, None]).max(axis=-1) < SAME
    assert (is_exact ^ is_mean).all()
    np.testing.assert_array_equal(is_exact.sum(axis=1), 2 * math.ceil(math.log(T)))
    # Heads and examples choose their own rows.
    assert len({tuple(rows) for rows in is_exact.transpose(0, 2, 1).reshape(-1, T)}) == B * N


def test_queries_that_tell_keys_apart_are_chosen():
    query, key, value = draw()
    query = query * jnp.where(jnp.arange(T) % 10 == 4, 8, 0.01)[None, :, None, None]
    made = efficient.make("prob_sparse", factor=4)  # 16 keys are drawn for each query
    for seed in range(3):
        found = made.attend({}, query, key, value, rng=jax.random.key(seed))
        np.testing.assert_allclose(
            found[:, 4::10], attention(query[:, 4::10], key, value), atol=SAME
        )


def test_enough_rows_are_softmax_attention():
    heads = draw()
    found = efficient.make("prob_sparse", factor=T).attend({}, *heads)
    np.testing.assert_allclose(found, attention(*heads), atol=SAME)


def test_draws():
    heads = draw()
    made = efficient.make("prob_sparse", factor=1)
    run = jax.jit(lambda rng: made.attend({}, *heads, rng=rng))
    np.testing.assert_array_equal(made.attend({}, *heads), made.attend({}, *heads))
    outs = [run(jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert abs(outs[0] - outs[2]).max() > 0.01


def test_padding_of_other_lengths_draws_nothing():
    """More than e times as long: the padded sequence alone would sample more keys and rows."""
    heads = draw(9)
    made = efficient.make("prob_sparse", factor=1)
    alone = made.attend({}, *heads)
    grown = [jnp.pad(x, ((0, 0), (2, 30), (0, 0), (0, 0)), constant_values=9.0) for x in heads]
    valid = jnp.pad(jnp.ones((B, 9), bool), ((0, 0), (2, 30)))
    found = made.attend({}, *grown, query_valid=valid, key_valid=valid)
    # What is drawn for a query depends on its position, and two stand in front.
    behind = [jnp.pad(x, ((0, 0), (0, 32), (0, 0), (0, 0)), constant_values=9.0) for x in heads]
    valid_behind = jnp.pad(jnp.ones((B, 9), bool), ((0, 0), (0, 32)))
    same = made.attend({}, *behind, query_valid=valid_behind, key_valid=valid_behind)
    np.testing.assert_allclose(same[:, :9], alone, atol=SAME)
    exact, mean = attention(*heads), heads[2].mean(axis=1)[:, None]
    rows = found[:, 2:11]
    error = jnp.minimum(abs(rows - exact).max(axis=-1), abs(rows - mean).max(axis=-1))
    assert error.max() < SAME


def test_mix_takes_heads_for_positions():
    heads = draw()
    plain, mixed = (efficient.make("prob_sparse", mix=mix).attend({}, *heads) for mix in (0, 1))
    np.testing.assert_array_equal(mixed, jnp.swapaxes(plain, 1, 2).reshape(plain.shape))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="factor=0: must be at least 1"):
        efficient.make("prob_sparse", factor=0)
