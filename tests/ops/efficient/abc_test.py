# SPDX-License-Identifier: Apache-2.0
"""ABC: loops in float64, slots that hold one token each, logits that are hard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, efficient, mask
from attnjax.ops.efficient import abc

B, N, H, R = 2, 2, 4, 3
SAME = 1e-5


def draw(t, sharpness=1.0):
    keys = jax.random.split(jax.random.key(0), 5)
    heads = [jax.random.normal(k, (B, t, N, H)) for k in keys[:3]]
    params = {
        name: sharpness * jax.random.normal(k, (H, R))
        for name, k in zip(("control_key", "control_value"), keys[3:], strict=True)
    }
    return params, heads


def brute_force(params, query, key, value):
    """Every slot from all tokens so far, O(t^2), float64."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)

    def slots(x_jh, control):
        logits = x_jh @ control
        weights = np.exp(logits - logits.max(axis=0))
        return (weights / weights.sum(axis=0)).T @ x_jh

    for b, i, n in np.ndindex(out.shape[:3]):
        key_rh = slots(key[b, : i + 1, n], params["control_key"])
        value_rh = slots(value[b, : i + 1, n], params["control_value"])
        scores = key_rh @ query[b, i, n] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights / weights.sum() @ value_rh
    return out


@pytest.mark.parametrize(("t", "sharpness"), [(abc.CHUNK + 9, 1.0), (19, 100.0)])
def test_causal_slots_equal_brute_force(t, sharpness):
    """Logits up to some hundred, whose exponentials no common shift could hold, among them."""
    params, heads = draw(t, sharpness)
    found = jax.jit(efficient.make("abc", causal=True, landmarks=R).attend)(params, *heads)
    np.testing.assert_allclose(found, brute_force(params, *heads), atol=SAME * sharpness**0.5)


def test_last_token_of_a_causal_row_knows_what_noncausal_rows_know():
    params, heads = draw(20)
    both = [
        jax.jit(efficient.make("abc", causal=causal, landmarks=R).attend)(params, *heads)
        for causal in (True, False)
    ]
    np.testing.assert_allclose(both[0][:, -1], both[1][:, -1], atol=SAME)
    assert abs(both[0][:, 5] - both[1][:, 5]).max() > 0.01


def test_one_slot_for_each_token_is_softmax_attention():
    """A control that is one-hot for tokens that are: slot r holds token r."""
    t, h = 6, 6
    keys = jax.random.split(jax.random.key(1), 2)
    query = jax.random.normal(keys[0], (B, t, N, h))
    tokens = jnp.broadcast_to(jnp.eye(t)[None, :, None], (B, t, N, h))
    sharp = {name: 60.0 * jnp.eye(h) for name in ("control_key", "control_value")}
    found = efficient.make("abc", landmarks=t).attend(sharp, query, tokens, tokens)
    expected = attention(query, tokens, tokens, mask=mask.full())
    np.testing.assert_allclose(found, expected, atol=SAME)
    causal = efficient.make("abc", causal=True, landmarks=t).attend(sharp, query, tokens, tokens)
    np.testing.assert_allclose(causal[:, -1], expected[:, -1], atol=SAME)


def test_released_causal_form_holds_one_token():
    params, heads = draw(12)
    made = efficient.make("abc", causal=True, landmarks=R, compat=True)
    found = made.attend(params, *heads)
    assert abs(found - brute_force(params, *heads)).max() > 0.1
    other = heads[2].at[:, :-1].set(5.0)
    changed = made.attend(params, *heads[:2], other)
    direction = lambda out: out[:, -1] / jnp.linalg.norm(out[:, -1], axis=-1, keepdims=True)
    own = heads[2][:, -1] / jnp.linalg.norm(heads[2][:, -1], axis=-1, keepdims=True)
    np.testing.assert_allclose(direction(found), own, atol=SAME)
    np.testing.assert_allclose(direction(changed), own, atol=SAME)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="landmarks=0: must be at least 1"):
        efficient.make("abc", landmarks=0)
