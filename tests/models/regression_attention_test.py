# SPDX-License-Identifier: Apache-2.0
"""The network of in-context linear regression against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models.regression_attention import INITIALS, PRESETS, RegressionAttention
from attnjax.parallel import make_mesh

ATOL = 2e-6


def inputs_of(model, batch=2, length=None):
    rng = np.random.default_rng(0)
    width = model.dim + model.outputs
    shape = (batch, model.prompts, length or model.length, width)
    query = rng.standard_normal((*shape[:2], width)).astype(np.float32)
    query[..., model.dim :] = 0
    return {"examples": rng.standard_normal(shape).astype(np.float32), "query": query}


def oracle(model, params, examples, query):
    """Softmax attention in float64, one prompt, replica and head at a time."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    b, p, s, width = examples.shape
    out = np.zeros((b, p, model.replicas, model.outputs))
    for i, j, r, n in np.ndindex(b, p, model.replicas, model.heads):
        part = lambda name: params[f"{name}_kernel"][r, :, n]
        scores = (examples[i, j] @ part("key")) @ (query[i, j] @ part("query")) / np.sqrt(width)
        if model.kernel == "softmax":
            weights = np.exp(scores) / np.exp(scores).sum()
        else:
            weights = scores / (s if model.kernel == "linear_mean" else model.length)
        read = weights @ (examples[i, j] @ part("value"))
        out[i, j, r] += read @ params["out_kernel"][r, n]
    return out


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"heads": 1}, 1),
        ({"heads": 8, "outputs": 2}, 5),
        ({"kernel": "linear_mean"}, 5),
        ({"kernel": "linear_sum"}, 100),
    ],
)
def test_forward_is_the_sum_written_out(fields, length):
    model = RegressionAttention(prompts=2, replicas=2, **fields)
    inputs = inputs_of(model, length=length)
    params = model.init(jax.random.key(0), **inputs)["params"]
    ours = model.apply({"params": params}, **inputs).prediction
    np.testing.assert_allclose(ours, oracle(model, params, **inputs), atol=ATOL)


def test_order_of_examples_and_other_replicas_do_not_matter():
    model = RegressionAttention(prompts=2, length=6, replicas=3)
    inputs = inputs_of(model)
    params = model.init(jax.random.key(0), **inputs)["params"]
    ours = model.apply({"params": params}, **inputs).prediction
    mixed = inputs | {"examples": inputs["examples"][:, :, ::-1]}
    np.testing.assert_allclose(model.apply({"params": params}, **mixed).prediction, ours, atol=ATOL)
    alone = RegressionAttention(prompts=2, length=6)
    one = alone.apply({"params": jax.tree.map(lambda x: x[1:2], params)}, **inputs).prediction
    np.testing.assert_allclose(one[:, :, 0], ours[:, :, 1], atol=ATOL)
    assert np.abs(ours[:, :, 0] - ours[:, :, 1]).max() > 1e-3


@pytest.mark.parametrize("init", INITIALS)
def test_initialisations(init):
    model = RegressionAttention(prompts=1, length=3, heads=2, initial=init)
    params = model.init(jax.random.key(0), **inputs_of(model))["params"]
    query, key = (np.asarray(params[f"{name}_kernel"])[0] for name in ("query", "key"))
    if init == "random":
        assert 0.3 < np.abs(query).max() <= 6**-0.5
        return
    size = 1e-4 if init == "small_id_qk" else 1e-6
    np.testing.assert_allclose(key[:, 0], size * np.eye(6), rtol=1e-6)
    sign = -1 if init == "oppo_small_id" else 1
    np.testing.assert_allclose(query[:, 0], size * np.eye(6), rtol=1e-6)
    np.testing.assert_allclose(query[:, 1], sign * size * np.eye(6), rtol=1e-6)
    is_small = np.abs(params["value_kernel"]).max() < 1e-5
    assert is_small == (init == "small_id")


def test_presets_have_their_parameters():
    for name, expected in (("single_task", 3 * 6 * 2 * 6 + 12), ("multi_task", 3 * 8 * 4 * 8 + 64)):
        model = RegressionAttention(**PRESETS[name])
        shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example(1))["params"]
        assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


def test_replicas_divided_over_devices_give_the_same():
    model = RegressionAttention(prompts=4, length=6, replicas=4)
    inputs = inputs_of(model, batch=2)
    params = model.init(jax.random.key(0), **inputs)["params"]
    alone = model.apply({"params": params}, **inputs).prediction
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 1, "model": 4, "context": 1})):
        ours = jax.jit(lambda p, x: model.apply({"params": p}, **x).prediction)(params, inputs)
    np.testing.assert_allclose(ours, alone, atol=ATOL)


@pytest.mark.slow
def test_bfloat16_and_remat_are_near():
    model = RegressionAttention(prompts=2, length=6)
    inputs = inputs_of(model)
    params = model.init(jax.random.key(0), **inputs)["params"]
    loss = lambda model: lambda p: jnp.sum(model.apply({"params": p}, **inputs).prediction ** 2)
    value, grads = jax.value_and_grad(loss(model))(params)
    again, same = jax.value_and_grad(loss(model.clone(remat="full")))(params)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, same)
    short = jax.value_and_grad(loss(model.clone(dtype="bfloat16")))(params)[0]
    np.testing.assert_allclose(short, value, rtol=0.1)


def test_gradients_are_finite_under_vmap():
    model = RegressionAttention(prompts=2, length=4)
    inputs = inputs_of(model)

    def loss(params, examples):
        return jnp.sum(model.apply({"params": params}, examples, inputs["query"]).prediction)

    params = model.init(jax.random.key(0), **inputs)["params"]
    many = jnp.stack([inputs["examples"], 2 * inputs["examples"]])
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, many)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in jax.tree.leaves(grads))


def test_wrong_fields_and_inputs_are_refused():
    for fields, message in (
        (dict(heads=0), "model.heads=0"),
        (dict(kernel="relu"), "model.kernel='relu'"),
        (dict(initial="zeros"), "model.initial='zeros'"),
        (dict(heads=3, initial="oppo_small_id"), "model.heads=3: oppo_small_id"),
    ):
        with pytest.raises(RecipeError, match=message):
            RegressionAttention(**fields)
    model = RegressionAttention(prompts=2, length=4)
    inputs = inputs_of(model)
    with pytest.raises(ValueError, match=r"dim \+ outputs = 6"):
        model.init(jax.random.key(0), inputs["examples"][..., :5], inputs["query"][..., :5])
    with pytest.raises(ValueError, match="must be"):
        model.init(jax.random.key(0), inputs["examples"], inputs["query"][:1])
