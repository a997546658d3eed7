# SPDX-License-Identifier: Apache-2.0
"""The sequence model: every mixer by name, sizes, inputs, refusals."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax
from attnjax.benchmarks import long_sequence
from attnjax.errors import RecipeError
from attnjax.models import build, sequence_mixer
from attnjax.models.load import abstract_params
from attnjax.ops.mixers import BIASES, MIXERS
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.weights import flatten

TINY = {"length": 12, "dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 3}
SAME_MATH = 2e-5  # float32 sums in another order, relative to the largest entry
HALF = 5e-2  # eight bits of mantissa through a few layers
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running


def inputs(model, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    ((name, x),) = model.example(batch).items()
    if name == "tokens":
        return {name: rng.integers(1, model.vocab, x.shape).astype(np.int32)}
    return {name: rng.standard_normal(x.shape).astype(np.float32)}


@functools.cache
def prepared(**fields):
    model = build("sequence_mixer", **TINY, **fields)
    params = jax.jit(model.init, compiler_options=QUICK)(jax.random.key(0), **inputs(model))
    return model, params["params"]


def logits(model, params, batch):
    run = lambda params, batch: model.apply({"params": params}, **batch).logits
    return np.asarray(jax.jit(run, compiler_options=QUICK)(params, batch))


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_mixer_by_name(mixer):
    model = build("sequence_mixer", **TINY, mixer=mixer)
    output, variables = jax.eval_shape(
        lambda batch: model.init_with_output(jax.random.key(0), **batch), model.example(4)
    )
    assert output.logits.shape == (4, 3) and output.logits.dtype == jnp.float32
    assert output.aux["features"].shape == (4, 16)
    leaves = flatten(variables["params"])
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}
    loaded = flatten(abstract_params(model))
    assert {k: x.shape for k, x in loaded.items()} == {k: x.shape for k, x in leaves.items()}
    assert model.flops() > 2 * model.build_mixer().flops(12, 16, 2)


@pytest.mark.parametrize("mixer", ["softmax", "s4d", "afno"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_is_finite_in_both_dtypes(mixer, dtype):
    model, params = prepared(mixer=mixer)
    batch = inputs(model)
    expected = logits(model, params, batch)
    found = logits(dataclasses.replace(model, dtype=dtype), params, batch)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    tolerance = {"float32": SAME_MATH, "bfloat16": HALF}[dtype]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * abs(expected).max())


@pytest.mark.parametrize("bias", BIASES)
def test_positions_are_seen_unless_there_is_no_bias(bias):
    model, params = prepared(bias=bias)
    batch = inputs(model)
    turned = {"values": batch["values"][:, ::-1]}
    change = abs(logits(model, params, batch) - logits(model, params, turned)).max()
    assert (change < SAME_MATH) == (bias == "identity")


def test_padding_has_no_influence_on_pools_that_know_of_it():
    model, params = prepared(vocab=9, mixer="softmax", bias="sinusoid")
    batch = inputs(model)
    batch["tokens"][:, 8:] = 0
    short = build("sequence_mixer", **{**TINY, "length": 8}, vocab=9, bias="sinusoid")
    np.testing.assert_allclose(
        logits(model, params, batch),
        logits(short, params, {"tokens": batch["tokens"][:, :8]}),
        atol=SAME_MATH,
    )


def test_pairs_are_compared():
    model, params = prepared(vocab=9, pool="pair")
    batch = inputs(model)
    assert batch["tokens"].shape == (4, 2, 12)
    both = logits(model, params, batch)
    features = jax.jit(
        lambda b: model.apply({"params": params}, **b).aux["features"], compiler_options=QUICK
    )(batch)
    first, second, product, difference = np.split(np.asarray(features), 4, axis=-1)
    np.testing.assert_allclose(product, first * second, atol=SAME_MATH)
    np.testing.assert_allclose(difference, first - second, atol=SAME_MATH)
    swapped = logits(model, params, {"tokens": batch["tokens"][:, ::-1]})
    assert both.shape == (4, 3) and abs(both - swapped).max() > SAME_MATH


def test_answers_at_every_position_and_at_the_last():
    model, params = prepared(pool="none", mixer="lru")
    batch = inputs(model)
    everywhere = logits(model, params, batch)
    assert everywhere.shape == (4, 12, 3)
    last = dataclasses.replace(model, pool="last")
    np.testing.assert_allclose(logits(last, params, batch), everywhere[:, -1], atol=SAME_MATH)
    late = batch["values"] + (np.arange(12) >= 6)[:, None].astype(np.float32)
    moved = logits(model, params, {"values": late})
    np.testing.assert_allclose(moved[:, :6], everywhere[:, :6], atol=SAME_MATH)


def test_recomputation_changes_no_gradient():
    model, params = prepared(mixer="softmax")
    batch = inputs(model)

    def gradient(model):
        loss = lambda p: jnp.sum(jnp.square(model.apply({"params": p}, **batch).logits))
        return flatten(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))

    plain, again = gradient(model), gradient(dataclasses.replace(model, remat="blocks"))
    for path, leaf in plain.items():
        np.testing.assert_allclose(
            again[path], leaf, atol=SAME_MATH * abs(leaf).max(), err_msg=path
        )


def test_sharded_equals_unsharded():
    model, params = prepared(mixer="softmax")
    batch = inputs(model, batch=8)
    expected = logits(model, params, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shardings, _ = tree_shardings(params, mesh)
    specs = {str(s.spec) for s in jax.tree.leaves(shardings)}
    assert any("model" in spec for spec in specs) and any("fsdp" in spec for spec in specs)
    with jax.set_mesh(mesh):
        found = logits(
            model, jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh))
        )
    np.testing.assert_allclose(found, expected, atol=SAME_MATH * abs(expected).max())


def test_captured_attention_sums_to_one_and_changes_nothing():
    model, params = prepared(mixer="softmax")
    batch = inputs(model)
    capture = lambda model, params: jax.jit(
        lambda p: model.apply({"params": p}, **batch, mutable=["attention"]), compiler_options=QUICK
    )(params)
    output, captured = capture(model, params)
    np.testing.assert_allclose(output.logits, logits(model, params, batch), atol=SAME_MATH)
    leaves = jax.tree.leaves(captured)
    assert len(leaves) == 2
    for weights in leaves:
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=SAME_MATH)
    ((title, found),) = model.attention_maps(captured).items()
    assert "softmax" in title and found.shape == (4, 1, 12)
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, atol=SAME_MATH)
    other, params = prepared(mixer="s4d")
    _, captured = capture(other, params)
    assert other.attention_maps(captured) == {}


def test_dropout_is_for_training_only():
    model, params = prepared(mixer="convolution")
    model = dataclasses.replace(model, dropout=0.5)
    batch = inputs(model)
    run = jax.jit(
        lambda key: model.apply({"params": params}, **batch, train=True, rngs={"dropout": key}),
        compiler_options=QUICK,
    )
    first, again, second = (run(jax.random.key(i)).logits for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert abs(first - second).max() > SAME_MATH
    assert np.isfinite(logits(model, params, batch)).all()


def test_presets_are_the_sizes_of_the_benchmark():
    counts = {}
    for preset in sequence_mixer.PRESETS:
        model = build("sequence_mixer", preset, length=64)
        leaves = flatten(abstract_params(model))
        counts[preset] = sum(leaf.size for leaf in leaves.values())
    # 4 blocks of 4 d^2 + 8 d^2 + 5 d + 4 d, a stem of 2 d, a norm of 2 d, a head of 10 d + 10.
    block = lambda d: 12 * d * d + 9 * d
    assert counts == {
        "small": 4 * block(128) + 14 * 128 + 10,
        "big": 6 * block(512) + 14 * 512 + 10,
    }
    params = jax.eval_shape(lambda: attnjax.load("sequence_mixer", "small", length=8)[1])
    assert params["block_3"]["mixer"]["out"]["kernel"].shape == (4, 32, 128)


def test_file_keeps_the_contract_of_models():
    fields = [f for f in dataclasses.fields(sequence_mixer.SequenceMixer)
              if f.name not in ("parent", "name")]  # fmt: skip
    assert len(fields) <= 16
    assert all(f.default is not dataclasses.MISSING for f in fields)
    documented = inspect.getdoc(sequence_mixer.SequenceMixer)
    assert all(f"\n  {f.name}:" in documented or f"    {f.name}:" in documented for f in fields)
    assert sequence_mixer.TORCH_NAMES is None
    assert sequence_mixer.PAPER == long_sequence.PAPER


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "softmx"}, "unknown mixer 'softmx': did you mean 'softmax'"),
        ({"mixer": "window", "mixer_options": {"windw": 1}}, "did you mean 'window'"),
        ({"mixer": "fnet", "bias": "rotary"}, "'fnet' has no queries to rotate; choose from ident"),
        ({"bias": "learned"}, "did you mean 'learnt'"),
        ({"pool": "max"}, "known: last, mean, none, pair"),
        ({"pool": "pair"}, "vocab must not be 0"),
        ({"num_heads": 3}, "num_heads=3 does not divide dim=16"),
        ({"channels": 0}, "nothing to read"),
        ({"depth": 0}, "depth=0"),
        ({"dimm": 1}, "did you mean 'dim'"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        build("sequence_mixer", **{**TINY, **fields})


def test_wrong_inputs_are_refused():
    model, params = prepared(mixer="softmax")
    with pytest.raises(ValueError, match=r"values must be \[b, \*\(12, 1\)\], got \(2, 11, 1\)"):
        model.apply({"params": params}, values=jnp.zeros((2, 11, 1)))
    with pytest.raises(ValueError, match="got nothing"):
        model.apply({"params": params}, tokens=jnp.zeros((2, 12), int))
