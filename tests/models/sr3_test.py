# SPDX-License-Identifier: Apache-2.0
"""SR3's network: the published one's answers and counts, attentions, precision, devices."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from attnjax.errors import RecipeError
from attnjax.models import sr3
from attnjax.models.load import abstract_params, build
from attnjax.nn import Downsample, ResidualBlock, Upsample
from attnjax.parallel import batch_sharding, make_mesh, tree_shardings
from attnjax.weights import flatten, unflatten

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/pictures.npz"
QUICK = {"xla_backend_optimization_level": 0}
SMALL = {"image_size": 8, "channels": 2, "width": 8, "multipliers": (1, 2), "depth": 1, "groups": 4,
         "attention_sides": (8,)}  # fmt: skip

TINY = {"multipliers": (1,), "attention_sides": ()}
"""Overrides that leave attention in the middle only."""

# Float32 through some twenty layers, relative to the largest entry.
TOLERANCE = 2e-5
HALF = 5e-2  # eight bits of mantissa, likewise

COUNTS = {"16-128": 99_466_627, "16-64": 2_685_795, "4-8": 611_873}


def close(ours, expected, tolerance=TOLERANCE, message=""):
    scale = np.abs(np.asarray(expected, np.float32)).max()
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), expected, rtol=0, atol=tolerance * scale, err_msg=message
    )


def draw(model, b=4, seed=0):
    rng = np.random.default_rng(seed)
    shape = model.example(b)["low"].shape
    return {
        "noisy": rng.standard_normal(shape, np.float32),
        "low": rng.uniform(-1, 1, shape).astype(np.float32),
        "noise_level": rng.uniform(0.1, 1, b).astype(np.float32),
    }


@functools.cache
def make(attention=None, **fields):
    """A small model, its parameters (larger than at the start) and its compiled answer."""
    model = build("sr3", **SMALL | fields, attention=attention, dropout=0.0)
    rng = np.random.default_rng(0)
    leaves = {
        path: np.float32(path.endswith("scale")) + 0.15 * rng.standard_normal(x.shape, np.float32)
        for path, x in flatten(abstract_params(model)).items()
    }
    answer = lambda p, batch: model.apply({"params": p}, **batch).noise
    run = jax.jit(answer, compiler_options=QUICK)
    return model, unflatten(leaves), run


def published(golden):
    """Parameters of our names from the tensors of the golden file."""
    shapes = [tuple(int(n) for n in row if n) for row in golden["weights/shapes"]]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    parts = np.split(golden["weights"].astype(np.float32), ends[:-1])
    tensors = {
        str(name): part.reshape(shape)
        for name, part, shape in zip(golden["weights/names"], parts, shapes, strict=True)
    }
    params = {}

    def put(path, tensor):
        weight, bias = tensors.pop(f"{tensor}.weight"), tensors.pop(f"{tensor}.bias")
        axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[weight.ndim]
        params[f"{path}/{'scale' if weight.ndim == 1 else 'kernel'}"] = weight.transpose(axes)
        params[f"{path}/bias"] = bias

    def block(path, tensor):
        put(f"{path}/vector", f"{tensor}.res_block.noise_func.noise_func.0")
        for name, part in (("first", "block1"), ("second", "block2")):
            put(f"{path}/{name}_norm", f"{tensor}.res_block.{part}.block.0")
            put(f"{path}/{name}", f"{tensor}.res_block.{part}.block.3")
        if f"{tensor}.res_block.res_conv.weight" in tensors:
            put(f"{path}/skip", f"{tensor}.res_block.res_conv")
        if f"{tensor}.attn.qkv.weight" in tensors:
            put(f"{path}_attention/norm", f"{tensor}.attn.norm")
            shell = f"{path}_attention/attention"
            fused = tensors.pop(f"{tensor}.attn.qkv.weight")[..., 0, 0]
            for name, part in zip(("query", "key", "value"), np.split(fused, 3), strict=True):
                params[f"{shell}/{name}/kernel"] = part.T[:, None]
                params[f"{shell}/{name}/bias"] = np.zeros_like(part[:1])
            params[f"{shell}/out/kernel"] = tensors.pop(f"{tensor}.attn.out.weight")[..., 0, 0].T[
                None
            ]
            params[f"{shell}/out/bias"] = tensors.pop(f"{tensor}.attn.out.bias")

    put("level/up", "noise_level_mlp.1")
    put("level/down", "noise_level_mlp.3")
    put("stem", "downs.0")
    block("down_0_0", "downs.1")
    put("shrink_0/conv", "downs.2.conv")
    block("down_1_0", "downs.3")
    block("middle_0", "mid.0")
    block("middle_1", "mid.1")
    for i, name in enumerate(("up_1_0", "up_1_1", None, "up_0_0", "up_0_1")):
        if name:
            block(name, f"ups.{i}")
    put("grow_1/conv", "ups.2.conv")
    put("final_norm", "final_conv.block.0")
    put("final", "final_conv.block.3")
    assert not tensors
    return params


def test_it_is_the_published_network():
    golden = np.load(GOLDENS, allow_pickle=False)
    _, params, run = make()
    weights = published(golden)
    assert {k: x.shape for k, x in flatten(params).items()} == {
        k: x.shape for k, x in weights.items()
    }
    batch = {
        name: golden[ours].astype(np.float32)
        for name, ours in (("low", "low"), ("noisy", "noisy"), ("noise_level", "level"))
    }
    close(run(unflatten(weights), batch), golden["noise"])


def test_counts_are_the_published_ones():
    """The published network's, and the biases of query, key and value that it does not have."""
    golden = np.load(GOLDENS, allow_pickle=False)
    expected = {n: int(golden[f"count/{n}"] + golden[f"biases/{n}"]) for n in ("softmax", "all")}
    assert expected["softmax"] == COUNTS["16-128"]
    assert build("sr3") == build("sr3", "16-128")
    local = build("sr3", "16-128", attention={"name": "local", "window": 15})
    assert sum(x.size for x in jax.tree.leaves(abstract_params(local))) == expected["all"]
    assert [stage.attends for stage in local.stages()] == [True] * 4 + [False]
    assert [stage.attends for stage in build("sr3").stages()] == [False] + [True] * 3 + [False]


@pytest.mark.parametrize("preset", sr3.PRESETS)
def test_preset_by_shapes(preset):
    assert set(COUNTS) == set(sr3.PRESETS)
    model = build("sr3", preset)
    example = model.example(2)
    output, variables = jax.eval_shape(
        lambda batch: model.init_with_output(jax.random.key(0), **batch), example
    )
    assert isinstance(output, sr3.Output) and set(variables) == {"params"}
    assert output.noise.shape == example["low"].shape and output.noise.dtype == jnp.float32
    leaves = jax.tree.leaves(variables["params"])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert sum(leaf.size for leaf in leaves) == COUNTS[preset]


def products(jaxpr):
    """Multiplications of all matrix products and convolutions of a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        for nested in jaxprs_in_params(equation.params):
            total += products(nested)
        shapes = [x.aval.shape for x in (*equation.invars[:2], equation.outvars[0])]
        if equation.primitive.name == "conv_general_dilated":
            total += math.prod(shapes[2][:3]) * math.prod(shapes[1])
        elif equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += math.prod(shapes[2]) * math.prod(shapes[0][i] for i in contracted)
    return total


def test_flops_are_those_of_the_products():
    model = build("sr3", "16-64", attention_implementation="reference")
    program = jax.make_jaxpr(lambda p, b: model.apply({"params": p}, **b).noise)(
        abstract_params(model), model.example(1)
    )
    assert model.flops() == 2 * products(program.jaxpr)


@pytest.mark.parametrize("attention", [None, "local"])
def test_examples_do_not_meet(attention):
    model, params, run = make(attention, **TINY)
    batch = draw(model)
    noise = run(params, batch)
    assert noise.dtype == jnp.float32 and np.isfinite(noise).all()
    rows = np.array([2, 0, 3, 1])
    close(run(params, {name: x[rows] for name, x in batch.items()}), noise[rows])
    other = draw(model, seed=1)
    mixed = {name: np.concatenate([batch[name][:1], x[1:]]) for name, x in other.items()}
    close(run(params, mixed)[:1], noise[:1])


def test_half_precision_is_near():
    model, params, run = make(**TINY)
    batch = draw(model)
    half = make(**TINY, dtype="bfloat16")[2](params, batch)
    assert half.dtype == jnp.float32
    close(half, run(params, batch), HALF)


def test_every_input_and_parameter_matters():
    model, params, _ = make("local")

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(params, batch):
        square = lambda p, b: jnp.mean(jnp.square(model.apply({"params": p}, **b).noise))
        return jax.grad(square, argnums=(0, 1))(params, batch)

    of_params, of_batch = jax.device_get(gradients(params, draw(model)))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(of_params))
    for path, gradient in flatten(of_params).items():
        assert np.isfinite(gradient).all(), path
        # A key's bias moves all scores of a query alike, which softmax does not see.
        expected = not path.endswith("key/bias")
        assert (np.abs(gradient).max() > 1e-5 * largest) == expected, path
    for name, gradient in of_batch.items():
        assert np.abs(gradient).max() > 0, name


def test_captured_attention_sums_to_one():
    model, params, run = make()
    batch = draw(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def look(params, batch):
        output, captured = model.apply({"params": params}, **batch, mutable=["attention"])
        return output.noise, model.attention_maps(captured)

    noise, maps = look(params, batch)
    close(noise, run(params, batch))
    ((title, map_byx),) = maps.items()
    assert title and map_byx.shape == (4, 4, 4)
    np.testing.assert_allclose(map_byx.sum(axis=(1, 2)), 1, atol=TOLERANCE)
    assert model.attention_maps({}) == {}


def test_recomputation_and_dropout():
    model, params, run = make(**TINY)
    batch = draw(model)
    again = build("sr3", **SMALL | TINY, dropout=0.5, remat="blocks")

    @functools.partial(jax.jit, static_argnames="train", compiler_options=QUICK)
    def answer(params, batch, key, train):
        return again.apply({"params": params}, **batch, train=train, rngs={"dropout": key}).noise

    first, second = jax.random.key(0), jax.random.key(1)
    noise = run(params, batch)
    close(answer(params, batch, first, False), noise)
    trained = [answer(params, batch, key, True) for key in (first, first, second)]
    np.testing.assert_array_equal(trained[0], trained[1])
    assert np.abs(trained[0] - trained[2]).max() > 1e-2 * np.abs(noise).max()


def test_blocks_by_hand():
    """A vector that scales, sizes, and which pixels a smaller or larger picture is made of."""
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 4), np.float32)
    vector = np.ones((1, 3), np.float32)
    block = ResidualBlock(4, groups=2, has_scale=True)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, vector)["params"]
    assert shapes["vector"]["kernel"].shape == (3, 8) and "skip" not in shapes
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    # With the scale at -1 and no shift nothing of the first convolution is left.
    params["vector"] = {"kernel": np.zeros((3, 8)), "bias": np.repeat([-1.0, 0.0], 4)}
    cut = {**params, "first": jax.tree.map(np.zeros_like, params["first"])}
    outs = [block.apply({"params": p}, x, vector) for p in (params, cut)]
    np.testing.assert_array_equal(*outs)
    wider = jax.eval_shape(ResidualBlock(8, groups=2).init, jax.random.key(0), x)["params"]
    assert wider["skip"]["kernel"].shape == (1, 1, 4, 8) and "vector" not in wider
    centre = np.zeros((3, 3, 4, 4), np.float32)
    centre[1, 1] = np.eye(4)
    params = {"params": {"conv": {"kernel": centre, "bias": np.zeros(4)}}}
    np.testing.assert_allclose(Downsample().apply(params, x), x[:, ::2, ::2])
    np.testing.assert_allclose(Upsample().apply(params, x), x.repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "locl"}, "model.attention='locl': unknown attention 'locl': did you mean"),
        ({"image_size": 9}, "image_size=9: must be a multiple of 2"),
        ({"groups": 3}, "groups=3 must divide width=8"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"attention_sides": (16,)}, r"no stage has side 16; sides are \[8, 4\]"),
        ({"multipliers": ()}, "multipliers="),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"remat": "all"}, "remat='all'"),
        ({"depth": 0}, "depth=0: must be at least 1"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(RecipeError, match=message):
        build("sr3", **SMALL | fields)


def test_inputs_of_another_shape_are_refused():
    model, params, _ = make(**TINY)
    batch = draw(model)
    for name in batch:
        with pytest.raises(ValueError, match=f"{name} must be"):
            model.apply({"params": params}, **batch | {name: batch[name][..., None]})


@pytest.mark.slow
def test_sharded_equals_unsharded():
    model, params, run = make()
    batch, mesh = draw(model, 8), make_mesh({"data": 2, "fsdp": 2, "model": 2})
    shardings, notes = tree_shardings(params, mesh, sr3.PARAM_AXES)
    specs = [s.spec for s in jax.tree.leaves(shardings)]
    assert any("fsdp" in spec for spec in specs) and any("model" in spec for spec in specs)
    assert len(notes) < len(specs) / 4, notes
    with jax.set_mesh(mesh):
        noise = run(jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh)))
    close(noise, run(params, batch))
