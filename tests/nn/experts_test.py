# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts against a loop over tokens, and what it owes to every expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.nn.experts import ExpertOptions, Experts
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.train import collectives
from attnjax.weights import flatten

TOLERANCE = 1e-5  # float32 sums in another order; values are of size 1
QUICK = {"xla_backend_optimization_level": 0}


def make(b=2, t=11, seed=0, **options):
    rng = np.random.default_rng(seed)
    module = Experts(12, ExpertOptions(**{"count": 4, "capacity": 2.0, "group": 4, **options}))
    x = rng.standard_normal((b, t, 8)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = jax.tree.map(
        lambda leaf: 0.5 * rng.standard_normal(leaf.shape).astype(np.float32), shapes
    )
    return module, params, x


def by_hand(params, x, top_k):
    """Every token through its best experts, in numpy."""
    p = {k: v.astype(np.float64) for k, v in flatten(params["params"]).items()}
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        token = x[place].astype(np.float64)
        scores = token @ p["router/kernel"]
        probabilities = np.exp(scores) / np.exp(scores).sum()
        best = np.argsort(-probabilities)[:top_k]
        weights = probabilities[best] / (probabilities[best].sum() if top_k > 1 else 1)
        for expert, weight in zip(best, weights, strict=True):
            gate = token @ p["gate/kernel"][expert]
            hidden = gate / (1 + np.exp(-gate)) * (token @ p["up/kernel"][expert])
            out[place] += weight * (hidden @ p["down/kernel"][expert])
    return out


@pytest.mark.parametrize("top_k", [1, 2])
def test_equals_a_loop_over_tokens(top_k):
    """With room for all; eleven tokens are no multiple of the group."""
    module, params, x = make(top_k=top_k, capacity=4.0)
    out, measures = jax.jit(module.apply)(params, x)
    np.testing.assert_allclose(out, by_hand(params, x, top_k), atol=TOLERANCE)
    assert float(measures["dropped"]) == pytest.approx(0, abs=1e-6)


def test_tokens_without_a_place_get_zero():
    module, params, x = make(top_k=1, capacity=0.25)
    out, measures = jax.jit(module.apply)(params, x)
    served = np.abs(out).max(axis=-1) > 0
    # One place per expert in every group of four tokens.
    assert served[:, :4].sum(axis=1).max() <= 4
    assert float(measures["dropped"]) == pytest.approx(1 - served.mean(), abs=1e-6)
    expected = by_hand(params, x, 1)
    np.testing.assert_allclose(out[served], expected[served], atol=TOLERANCE)


def test_padding_takes_no_place_and_counts_nowhere():
    module, params, x = make(top_k=2, capacity=1.0, group=16)
    valid = np.arange(11)[None] >= np.array([[3], [0]])
    run = jax.jit(module.apply)
    out, measures = run(params, x, valid)
    noise = np.where(valid[..., None], x, 7.0).astype(np.float32)
    again, same = run(params, noise, valid)
    np.testing.assert_array_equal(out, again)
    assert not np.abs(out[0, :3]).any()
    assert {k: float(v) for k, v in measures.items()} == {k: float(v) for k, v in same.items()}


def test_penalty_is_the_weighted_sum():
    module, params, x = make(load_loss=0.5, z_loss=0.25)
    _, measures = jax.jit(module.apply)(params, x)
    expected = 0.5 * measures["load_loss"] + 0.25 * measures["z_loss"]
    np.testing.assert_allclose(measures["penalty"], expected, rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_expert_and_the_router_learn(top_k):
    module, params, x = make(b=4, t=16, top_k=top_k, capacity=1.25)
    loss = lambda p: jnp.sum(module.apply(p, x)[0] ** 2)
    for path, gradient in flatten(jax.jit(jax.grad(loss))(params)["params"]).items():
        axes = (0,) if "router" in path else (1, 2)
        assert (np.abs(gradient).max(axis=axes) > 0).all(), path


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "model": 2}, {"context": 4, "model": 2}], ids=str)
def test_divided_experts_compute_the_same_and_exchange_tokens(sizes):
    module, params, x = make(b=4, t=16, capacity=1.25)

    def run(p, x):
        return jnp.sum(module.apply(p, x)[0] ** 2)

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1)), compiler_options=QUICK)
    loss, (gradients, _) = step(params, x)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        shardings = tree_shardings({"experts": params["params"]}, mesh)[0]["experts"]
        placed = {"params": jax.device_put(params["params"], shardings)}
        rows = jax.device_put(x, batch_sharding(mesh))
        again, (found, _) = step(placed, rows)
        text = step.lower(placed, rows).compile().as_text()
    assert placed["params"]["up"]["kernel"].sharding.shard_shape((4, 8, 12)) == (1, 8, 6)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(leaf, flatten(gradients)[path], atol=1e-4, err_msg=path)
    # Tokens go to their experts and come back, forward and backward.
    assert collectives.total(collectives.read(text))["all-to-all"]["executions"] == 4


def test_options_come_from_a_recipe():
    assert ExpertOptions.of(None) is None and ExpertOptions.of({}) is None
    options = ExpertOptions.of({"count": 8, "top_k": 1})
    assert (options.count, options.top_k, options.capacity) == (8, 1, 1.25)
    assert ExpertOptions.of(options) is options
    with pytest.raises(RecipeError, match="did you mean 'capacity'"):
        ExpertOptions.of({"count": 8, "capactiy": 1.0})
    for name, value in {"capacity": 0.0, "group": 0, "load_loss": -1.0, "z_loss": -1.0}.items():
        with pytest.raises(ValueError, match=f"experts.{name}"):
            ExpertOptions.of({"count": 8, name: value})
