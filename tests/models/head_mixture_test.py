# SPDX-License-Identifier: Apache-2.0
"""A decoder whose heads are chosen: dense, sparse, packed, cached, sharded, from dense weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.models.decoder import Decoder
from attnjax.parallel import batch_sharding, make_mesh
from attnjax.tasks import LanguageModelling

ATOL = 2e-5
FIELDS = {"vocab_size": 40, "width": 32, "depth": 2, "heads": (8, 4), "hidden": 48, "length": 20}
TOKENS = np.random.default_rng(0).integers(0, 40, (4, 20)).astype(np.int32)


def mixed(**options):
    chosen = {"name": "head_mixture", "shared": 3, "top_k": 2, **options}
    return Decoder(**FIELDS, attention=chosen)


@pytest.fixture(scope="module")
def params():
    drawn = mixed().init(jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda x: 3 * x, drawn)


def logits(model, params, *arguments):
    return jax.jit(model.apply)({"params": params}, *arguments)


def without_router(params):
    attention = {k: v for k, v in params["layers"]["attention"].items() if k != "router"}
    return {**params, "layers": {**params["layers"], "attention": attention}}


def test_half_of_the_heads_matter(params):
    """Gates of zero scores with all heads chosen are one: the dense decoder's logits."""
    assert set(params["layers"]["attention"]["router"]) == {"routed", "types", "shared"}
    dense = logits(Decoder(**FIELDS), without_router(params), TOKENS).logits
    zeros = jax.tree.map(jnp.zeros_like, params["layers"]["attention"]["router"])
    attention = {**params["layers"]["attention"], "router": zeros}
    even = {**params, "layers": {**params["layers"], "attention": attention}}
    all_chosen = logits(mixed(top_k=5), even, TOKENS)
    np.testing.assert_allclose(all_chosen.logits, dense, atol=ATOL)
    np.testing.assert_allclose(all_chosen.aux["balance_loss"], 5, rtol=1e-5)
    output = logits(mixed(), params, TOKENS)
    assert np.abs(output.logits - dense).max() > 1e-2
    np.testing.assert_allclose(output.aux["penalty"], 0.01 * output.aux["balance_loss"], rtol=1e-5)


def test_routing_by_queries_needs_no_parameters(params):
    """The tree is the dense one's; with all heads chosen so are the logits, to the last bit."""
    dense = without_router(params)
    model = mixed(router="queries", top_k=5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(dense)
    np.testing.assert_array_equal(
        logits(model, dense, TOKENS).logits, logits(Decoder(**FIELDS), dense, TOKENS).logits
    )
    some = mixed(router="queries")
    loss = lambda params: jnp.sum(jnp.sin(some.apply({"params": params}, TOKENS).logits))
    grad = jax.jit(jax.grad(loss))(dense)["layers"]["attention"]["query"]["kernel"]
    assert np.abs(grad).max() > 1e-3


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shared", [3, 4])
def test_sparse_is_dense_with_places_for_all(params, window, shared):
    """Also where the border between shared and routed heads cuts a group that shares keys."""
    segments = np.repeat([[1] * 8 + [2] * 9 + [0] * 3], 4, axis=0).astype(np.int32)
    outs = []
    for compute in ("dense", "sparse"):
        model = mixed(compute=compute, capacity=9.0, shared=shared, router="queries")
        model = model.clone(window=window)
        outs.append(logits(model, without_router(params), TOKENS, segments))
    np.testing.assert_allclose(outs[1].logits[:, :17], outs[0].logits[:, :17], atol=ATOL)
    assert outs[1].aux["dropped"] == 0
    few = mixed(compute="sparse", capacity=0.5, shared=shared, router="queries")
    assert logits(few, without_router(params), TOKENS).aux["dropped"] > 0.3


def test_reading_with_a_cache(params):
    model = mixed()
    whole = logits(model, params, TOKENS).logits
    extend = jax.jit(functools.partial(model.apply, method="extend"))
    cache, parts = model.empty_cache(4, 20), []
    for start, stop in ((0, 12), (12, 13), (13, 20)):
        output, cache = extend({"params": params}, TOKENS[:, start:stop], cache)
        parts.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=ATOL)


def test_eight_devices_balance_as_one(params):
    task = LanguageModelling(mixed(compute="sparse"))
    tokens = np.tile(TOKENS, (2, 1))
    run = jax.jit(lambda p, b: task.loss(p, b, jax.random.key(0), 0))
    alone = run(params, {"tokens": tokens})
    mesh = make_mesh({"data": 4, "model": 2})
    with jax.set_mesh(mesh):
        batch = jax.device_put({"tokens": tokens}, batch_sharding(mesh))
        shared = run(params, batch)
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(shared[1]["balance_loss"], alone[1]["balance_loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": 7}, "at most the other 1"),
        ({"top_k": 0}, "never work"),
        ({"router": "random"}, "heads.router='random'"),
        ({"compute": "lazy"}, "heads.compute='lazy'"),
        ({"capacity": 0}, "heads.capacity=0"),
        ({"router": "queries", "shared": 7, "top_k": 1}, "two routed heads"),
        ({"topk": 2}, "topk"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(RecipeError, match=message):
        mixed(**options)
