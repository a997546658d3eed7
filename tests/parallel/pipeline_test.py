# SPDX-License-Identifier: Apache-2.0
"""Pipelines over layer groups: values and gradients of the sequential stack, schedule, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import attention, mask
from attnjax.parallel import bubble_fraction, constrain, make_mesh, pipeline

# Float32 sums in another order, relative to the largest number.
TOLERANCE = 2e-6
QUICK = {"xla_backend_optimization_level": 0}
D, N = 8, 2


def stage_mesh(stages, name="stage"):
    types = (AxisType.Auto,)
    return jax.make_mesh((stages,), (name,), axis_types=types, devices=jax.devices()[:stages])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def dense(kernel, x):
    return x + jnp.tanh(x @ kernel)


def block(params, carried):
    """A pre-norm decoder layer; the segments only accompany the hidden states."""
    x, segments = carried
    normal = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    heads = lambda x: x.reshape(*x.shape[:2], N, -1)
    query, key, value = (heads(normal(x) @ params[name]) for name in ("query", "key", "value"))
    seen = mask.causal() & mask.segments(segments, segments)
    x = x + attention(query, key, value, mask=seen).reshape(x.shape) @ params["out"]
    x = constrain(x, "batch", None, None)
    return x + jax.nn.gelu(normal(x) @ params["up"]) @ params["down"], segments


def block_inputs(layers, m):
    shapes = dict.fromkeys(("query", "key", "value", "out"), (D, D))
    shapes |= {"up": (D, 2 * D), "down": (2 * D, D)}
    params = {
        name: 0.4 * draw(layers, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())
    }
    segments = np.broadcast_to(np.array([1, 1, 1, 2, 2], np.int32), (m, 2, 5))
    return params, draw(m, 2, 5, D, seed=9), segments


def sequential(layer, params, microbatches):
    """One layer after another, microbatch by microbatch."""
    apply = lambda x: jax.lax.scan(lambda x, one: (layer(one, x), None), x, params)[0]
    return jax.lax.map(apply, microbatches)


def measured(run, params, x):
    """Output, and gradients of a loss in which every output has its own weight."""

    def loss(params, x):
        out = run(params, x)
        return jnp.sum(out * draw(*out.shape, seed=5)), out

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=QUICK)
    gradients, out = step(params, x)
    return out, gradients


def close(found, expected):
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(wanted).max()
        assert scale > 0
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE * scale)


@functools.cache
def expected_dense(m):
    params = 0.5 * draw(8, D, D)
    x = draw(m, 2, D, seed=1)
    return params, x, measured(functools.partial(sequential, dense), params, x)


@pytest.mark.parametrize(
    ("stages", "m", "remat"),
    [(1, 3, False), (2, 5, False), (4, 1, True), (4, 3, False), (8, 5, True)],
)
def test_equals_the_sequential_stack(stages, m, remat):
    """Groups of several layers and of one; more and fewer microbatches than stages."""
    params, x, expected = expected_dense(m)
    run = functools.partial(
        pipeline, dense, axis_name="stage", mesh=stage_mesh(stages), remat=remat
    )
    close(measured(run, params, x), expected)


@pytest.mark.parametrize("axis", ["fsdp", "context"])
def test_decoder_blocks_under_an_ambient_mesh(axis):
    """Two layers a stage; segments travel, and examples stay divided over another axis."""
    params, x, segments = block_inputs(4, 3)
    expected = measured(lambda p, x: sequential(block, p, (x, segments))[0], params, x)
    mesh = make_mesh({axis: 2, "data": 2, "model": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P(axis)))
        rows = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
        run = lambda p, x: pipeline(block, p, (x, segments), axis_name=axis, remat=True)[0]
        out, gradients = measured(run, placed, rows)
    close((out, gradients), expected)
    for leaf in jax.tree.leaves(gradients[0]):
        assert leaf.sharding.spec[0] == axis


def test_bfloat16_and_calls_outside_of_jit():
    params, x, _ = expected_dense(3)
    params, x = jnp.bfloat16(params), jnp.bfloat16(x)
    mesh = make_mesh({"fsdp": 2, "data": 4})
    run = functools.partial(pipeline, dense, axis_name="fsdp", mesh=mesh)
    found = jax.grad(lambda x: run(params, x).astype(jnp.float32).sum())(x)
    assert found.dtype == jnp.bfloat16
    wanted = jax.grad(lambda x: sequential(dense, params, x).astype(jnp.float32).sum())(x)
    # The same operations on the same numbers; XLA may round in other places.
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), rtol=2**-6, atol=2**-6)


def test_waiting_ranks_cannot_poison_gradients():
    """The norm of zeros has no derivative: nothing but real data may be worked on."""
    layer = lambda kernel, x: (x @ kernel) / jnp.linalg.norm(x, axis=-1, keepdims=True)
    params, x, _ = expected_dense(3)
    run = functools.partial(pipeline, layer, axis_name="stage", mesh=stage_mesh(4))
    expected = measured(functools.partial(sequential, layer), params, x)
    close(measured(run, params, x), expected)


def test_schedule():
    """Ticks of the loop, in the program and by the formula."""
    params, x, _ = expected_dense(5)
    run = functools.partial(pipeline, dense, axis_name="stage", mesh=stage_mesh(4))
    assert "length=8" in str(jax.make_jaxpr(run)(params, x))
    assert bubble_fraction(4, 5) == 3 / 8
    assert bubble_fraction(1, 7) == 0
    assert bubble_fraction(8, 8) == 7 / 15


def test_recomputation_saves_memory():
    """What the forward pass leaves for the backward one: four layers, or one input, a tick."""
    layer = lambda kernel, x: x + jnp.tanh(jnp.tanh(x @ kernel) @ kernel)
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((8, 16, 16), (16, 64, 16))]
    sizes = {}
    for remat in (False, True):
        run = functools.partial(pipeline, layer, axis_name="stage", mesh=stage_mesh(2), remat=remat)
        step = jax.jit(jax.grad(lambda p, x, run=run: run(p, x).sum()), compiler_options=QUICK)
        sizes[remat] = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    activations = 17 * 64 * 16 * 4
    assert sizes[False] - sizes[True] > 4 * activations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis_name": "stages"}, r"axis_name='stages'.*known: stage\)"),
        ({"mesh": None}, "known: none: call jax.set_mesh"),
        ({"params": np.ones((6, D, D), np.float32)}, "6 layers cannot be divided over 4 stages"),
        ({"params": {}}, "params: there are no layers"),
        ({"params": (np.ones((4, D)), np.ones((8, D)))}, r"one leading axis of layers, got \[\(4,"),
        ({"microbatches": np.ones((0, 2, D), np.float32)}, "there are no microbatches"),
        ({"microbatches": np.float32(1)}, "one leading axis of microbatches"),
        ({"layer": lambda kernel, x: x[..., :4] @ kernel[:4, :4]}, r"float32\[2, 4\]"),
        ({"layer": lambda kernel, x: jnp.bfloat16(x @ kernel)}, r"bfloat16\[2, 8\]"),
    ],
)
def test_refusals(change, message):
    given = {"layer": dense, "params": np.ones((8, D, D), np.float32)}
    given |= {"microbatches": np.ones((3, 2, D), np.float32), "axis_name": "stage"}
    given |= {"mesh": stage_mesh(4)} | change
    with pytest.raises(ValueError, match=message):
        pipeline(given.pop("layer"), given.pop("params"), given.pop("microbatches"), **given)


def test_manual_axes_are_refused():
    mesh = stage_mesh(2)
    inside = lambda x: pipeline(dense, jnp.ones((2, D, D)), x, axis_name="stage")
    with pytest.raises(ValueError, match="manual here"):
        jax.shard_map(inside, mesh=mesh, in_specs=P(), out_specs=P())(jnp.ones((1, 2, D)))


@pytest.mark.parametrize(("stages", "m", "name"), [(0, 1, "stages"), (1, 0, "microbatches")])
def test_bubbles_of_nothing_are_refused(stages, m, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        bubble_fraction(stages, m)
