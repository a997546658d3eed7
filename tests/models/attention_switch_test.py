# SPDX-License-Identifier: Apache-2.0
"""Every attention trains inside the models that take one, on eight devices as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnjax.models.load import build
from attnjax.ops import efficient
from attnjax.ops.efficient import ATTENTIONS
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.weights import flatten

SAME = 1e-4  # float32 sums in another order, through two layers and one step
LENGTH = 16
SMALL = {"width": 32, "depth": 2, "hidden": 64}

# Sizes at which sixteen tokens are more than one window, chunk or block.
OPTIONS = {
    "long_short": {"window": 4, "landmarks": 4, "chunk": 4, "memory": 8},
    "local": {"window": 3},
}

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def serves(name, **flags):
    return efficient.pattern_of(flags.get("causal", False), flags.get("cross", False)) in (
        ATTENTIONS[name].patterns
    )


def decoder(attention):
    return build(
        "decoder", vocab_size=40, length=LENGTH, heads=(4, 4), attention=attention, **SMALL
    )


def vit(attention):
    return build(
        "vit", num_classes=8, image_size=16, patch_size=4, num_heads=4, pool="mean",
        attention=attention, **SMALL,
    )  # fmt: skip


def encoder_decoder(attention, place="cross_attention"):
    return build(
        "encoder_decoder", vocab_size=40, lengths=(LENGTH, LENGTH), num_heads=4, dropout=0.0,
        **{place: attention}, **(SMALL | {"depth": (1, 1)}),
    )  # fmt: skip


PLACES = {
    "decoder": (decoder, {"causal": True}),
    "vit": (vit, {}),
    "encoder": (functools.partial(encoder_decoder, place="encoder_attention"), {}),
    "writer": (functools.partial(encoder_decoder, place="decoder_attention"), {"causal": True}),
    "cross": (encoder_decoder, {"causal": True, "cross": True}),
}
QUICK = {("decoder", "local"), ("vit", "softmax")}
CASES = [
    pytest.param(place, name, marks=() if (place, name) in QUICK else pytest.mark.slow)
    for place, (_, flags) in PLACES.items()
    for name in sorted(ATTENTIONS)
    if serves(name, **flags)
]


def draw(model):
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(3, 40, x.shape).astype(np.int32)
        if np.issubdtype(x.dtype, np.integer)
        else rng.standard_normal(x.shape, np.float32)
        for name, x in model.example(8).items()
    }


def train_once(model, params, batch):
    """Return the loss and the parameters after one step."""

    def loss(params):
        output = model.apply(
            {"params": params}, **batch, train=True, rngs={"attention": jax.random.key(1)}
        )
        return jnp.mean(jnp.square(output.logits - 1))

    value, gradients = jax.value_and_grad(loss)(params)
    optimiser = optax.sgd(0.1)
    updates, _ = optimiser.update(gradients, optimiser.init(params))
    return value, optax.apply_updates(params, updates)


@pytest.mark.parametrize(("place", "name"), CASES)
def test_a_step_on_eight_devices_equals_one(place, name):
    make, _ = PLACES[place]
    model = make({"name": name, **OPTIONS.get(name, {})})
    batch = draw(model)
    params = quick(lambda: model.init(jax.random.key(0), **batch)["params"])()
    step = quick(functools.partial(train_once, model))
    loss, updated = step(params, batch)
    assert np.isfinite(loss)
    moved = {
        path: np.abs(leaf - flatten(params)[path]).max() for path, leaf in flatten(updated).items()
    }
    assert max(moved.values()) > SAME
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shardings, _ = tree_shardings(params, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        rows = jax.device_put(batch, batch_sharding(mesh))
        divided, after = step(placed, rows)
    np.testing.assert_allclose(divided, loss, rtol=SAME)
    for path, leaf in flatten(jax.device_get(after)).items():
        np.testing.assert_allclose(leaf, flatten(updated)[path], atol=SAME, err_msg=path)
