# SPDX-License-Identifier: Apache-2.0
"""The divided layer equals the module on one device and sums activations once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.nn.attention import MultiHeadAttention
from attnjax.ops import attention, mask
from attnjax.parallel import DistributedPlan, attention_layer

B, T, D, N, H = 2, 13, 12, 4, 6
FORWARD = 1e-5
"""Of float32 numbers of size one."""
GRADIENT = 1e-4
"""Of sums of some dozens of them."""


def inputs(k=N, has_bias=True):
    rng = np.random.default_rng(k)
    random = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, cotangent = random(B, T, D), random(B, T, D)
    params = {
        "query": {"kernel": random(D, N, H) / 3, "bias": random(N, H)},
        "key": {"kernel": random(D, k, H) / 3, "bias": random(k, H)},
        "value": {"kernel": random(D, k, H) / 3, "bias": random(k, H)},
        "out": {"kernel": random(N, H, D) / 5, "bias": random(D)},
    }
    if not has_bias:
        params = {name: {"kernel": part["kernel"]} for name, part in params.items()}
    return params, x, cotangent


def plain(params, x, seen):
    """The unsharded layer."""
    query, key, value = (
        jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"]) + params[name].get("bias", 0)
        for name in ("query", "key", "value")
    )
    out = attention(query, key, value, mask=seen)
    return jnp.einsum("btnh,nhd->btd", out, params["out"]["kernel"]) + params["out"].get("bias", 0)


@pytest.mark.parametrize(
    ("ways", "examples", "k", "has_bias"),
    [
        ((4, 2, 1), 1, 4, True),
        pytest.param((4, 1, 2), 2, 1, False, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), 1, 2, True, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 2, 4, True, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 2, 4, True, marks=pytest.mark.slow),
    ],
)
def test_equals_the_unsharded_layer(ways, examples, k, has_bias):
    """Values and the gradients of all parameters; thirteen tokens divide by no number of parts."""
    params, x, cotangent = inputs(k, has_bias)
    plan = DistributedPlan(*ways, examples=examples)

    def run(layer):
        def loss(params, x):
            out = layer(params, x)
            return (out * cotangent).sum(), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    gradients, out = run(lambda params, x: attention_layer(params, x, plan, mask=mask.causal()))
    gradients_, out_ = run(lambda params, x: plain(params, x, mask.causal()))
    np.testing.assert_allclose(out, out_, atol=FORWARD)
    for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_), strict=True):
        np.testing.assert_allclose(one, two, atol=GRADIENT)


def test_takes_the_parameters_of_the_module_and_sums_once():
    _, x, _ = inputs()
    module = MultiHeadAttention(num_heads=N)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    layer = jax.jit(lambda params, x: attention_layer(params, x, "heads", mesh))
    compiled = layer.lower(variables["params"], x).compile()
    np.testing.assert_allclose(
        compiled(variables["params"], x), jax.jit(module.apply)(variables, x), atol=FORWARD
    )
    # Two ways over examples, two over heads: one sum of activations and nothing else.
    program = jax.make_jaxpr(layer)(variables["params"], x)
    counts = {name: str(program).count(f" {name}") for name in ("psum", "all_gather", "ppermute")}
    assert counts == {"psum": 1, "all_gather": 0, "ppermute": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": {}}, "params lack key/kernel"),
        ({"out": {"kernel": jnp.zeros((N, H, D + 1))}}, r"out/kernel has shape .* expected \(4,"),
        ({"value": {"kernel": jnp.zeros((D, 3, H))}}, "key/kernel has shape"),
        ({"query": {"kernel": jnp.zeros((D, 5, H))}}, "out/kernel has shape"),
        ({"query": {"kernel": jnp.zeros((D, H))}}, "query/kernel must have rank 3"),
    ],
)
def test_refusals(change, message):
    params, x, _ = inputs(has_bias=False)
    with pytest.raises(ValueError, match=message):
        attention_layer(params | change, x)
    with pytest.raises(ValueError, match=r"x must be floating \[b,t,d\]"):
        attention_layer(params, x[0])
