# SPDX-License-Identifier: Apache-2.0
"""Which attention a module gets: the core's, or the one for tokens divided over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax.parallel
from attnjax.nn.attend import attend
from attnjax.nn.attention import MultiHeadAttention
from attnjax.ops import attention, mask
from attnjax.parallel import make_mesh


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of context attention, and serve them by the core."""
    seen = []

    def context_attention(query, key, value, *, method, axis, **options):
        seen.append({"method": method, "axis": axis, **options})
        return attention(query, key, value, **options)

    monkeypatch.setattr(attnjax.parallel, "context_attention", context_attention, raising=False)
    return seen


def inputs(t=6):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, t, 4, 8), np.float32)) for _ in range(3)]


CONTEXT = {"data": 2, "context": 4}


def test_without_a_context_axis_the_core_attends(calls):
    q, k, v = inputs()
    expected = attention(q, k, v, mask=mask.causal())
    np.testing.assert_array_equal(attend(q, k, v, mask=mask.causal()), expected)
    with jax.set_mesh(make_mesh({"data": 2, "model": 4})):
        out = jax.jit(lambda *x: attend(*x, mask=mask.causal(), implementation="context:ring"))
        np.testing.assert_allclose(out(q, k, v), expected, atol=1e-6)
    assert calls == []


@pytest.mark.parametrize(
    ("implementation", "expected"),
    [
        (None, {"method": "auto"}),
        ("context:usp", {"method": "usp"}),
        ("chunked", {"method": "auto", "implementation": "chunked"}),
    ],
)
def test_divided_tokens_go_to_context_attention(calls, implementation, expected):
    q, k, v = inputs()
    with jax.set_mesh(make_mesh(CONTEXT)):
        jax.jit(lambda *x: attend(*x, scale=0.5, implementation=implementation))(q, k, v)
    assert calls == [{**expected, "axis": "context", "scale": 0.5}]


def test_whole_maps_and_manual_axes_stay_with_the_core(calls):
    q, k, v = inputs(8)
    mesh = make_mesh(CONTEXT)
    spec = jax.sharding.PartitionSpec(None, "context")
    with jax.set_mesh(mesh):
        out = jax.jit(lambda *x: attend(*x, return_probabilities=True))(q, k, v)
        inside = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, axis_names={"context"})
        jax.jit(inside)(q, k, v)
    assert out.probabilities.shape == (2, 4, 8, 8)
    assert calls == []


@pytest.mark.parametrize("t", [8, 7])
def test_multi_head_attention_takes_the_same_way(calls, t):
    """With lengths that the context axis divides, and that it does not."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, t, 12), np.float32))
    module = MultiHeadAttention(num_heads=3)
    params = module.init(jax.random.key(0), x)
    expected = module.apply(params, x)
    with jax.set_mesh(make_mesh(CONTEXT)):
        out = jax.jit(module.apply)(params, x)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert [call["axis"] for call in calls] == ["context"]
