# SPDX-License-Identifier: Apache-2.0
"""The attention core under JAX's transformations, and over several devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import attention
from attnjax.ops.cases import CASES
from attnjax.parallel import make_mesh

SERVED = ("reference", "chunked")

TOLERANCE = 2e-5  # float32, relative to the largest entry
SECOND_ORDER = 2e-4  # sums of products of gradients
STEP = 1e-3  # of central differences in float64: their own error is of the order of its square

BY_NAME = {case.name: case for case in CASES}
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
both = pytest.mark.parametrize("implementation", SERVED)


def call(case, implementation):
    """A case, or the one of a name, as a function of query, key, value (and bias); its arrays."""
    case = BY_NAME.get(case, case)
    options = case.options()
    arrays = case.arrays()
    if "bias" in options:
        arrays += (options.pop("bias"),)

    def run(query, key, value, *bias):
        named = {"bias": bias[0]} if bias else {}
        return attention(query, key, value, **named, **options, implementation=implementation)

    return run, arrays


def cotangent(run, arrays):
    out = jax.eval_shape(run, *arrays)
    return np.random.default_rng(7).standard_normal(out.shape).astype(np.float32)


def gradients(run, arrays):
    dout = cotangent(run, arrays)
    return jax.grad(lambda a: jnp.sum(run(*a) * dout))(arrays)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@both
def test_jit_changes_nothing(implementation):
    run, arrays = call("everything", implementation)
    assert_close(compiled(run)(*arrays), run(*arrays))


@both
def test_vmap_is_a_loop(implementation):
    run, arrays = call("mask_dense", implementation)
    stacked = tuple(jnp.stack([x, -x, 2 * x]) for x in arrays)
    loop = [tuple(x[i] for x in stacked) for i in range(3)]
    assert_close(compiled(jax.vmap(run))(*stacked), jnp.stack([run(*a) for a in loop]))
    one = lambda *a: gradients(run, a)
    expected = jax.tree.map(lambda *g: jnp.stack(g), *[compiled(one)(*a) for a in loop])
    assert_close(compiled(jax.vmap(one))(*stacked), expected)
    # Over one argument and another axis; the others are shared.
    keys = jnp.stack([arrays[1], arrays[1] + 1], axis=2)
    outs = compiled(jax.vmap(run, in_axes=(None, 2, None)))(arrays[0], keys, arrays[2])
    assert_close(outs[1], run(arrays[0], keys[:, :, 1], arrays[2]))


@both
def test_scan_is_a_loop(implementation):
    """Layers of attention, each on the result of the one before, and the gradient through them."""
    run, (query, key, value) = call("mask_causal", implementation)
    keys, values = (jnp.stack([x, x + 0.1, -x]) for x in (key, value))

    def scanned(query, keys, values):
        return jax.lax.scan(lambda q, kv: (run(q, *kv), None), query, (keys, values))[0]

    def looped(query, keys, values):
        for k, v in zip(keys, values, strict=True):
            query = run(query, k, v)
        return query

    arrays = (query, keys, values)
    assert_close(compiled(scanned)(*arrays), looped(*arrays))
    ours, theirs = (compiled(lambda *a: gradients(f, a))(*arrays) for f in (scanned, looped))
    assert_close(ours, theirs)


@both
def test_recomputation_changes_nothing(implementation):
    run, arrays = call("mask_dense", implementation)
    ours, theirs = (
        compiled(lambda *a: gradients(f, a))(*arrays) for f in (jax.checkpoint(run), run)
    )
    assert_close(ours, theirs)


@both
@pytest.mark.parametrize("name", ["everything", pytest.param("tiled", marks=pytest.mark.slow)])
def test_sharded_inputs_give_the_same(name, implementation):
    """Examples over two axes, heads over the third; the result stays where its examples are."""
    run, arrays = call(dataclasses.replace(BY_NAME[name], b=4), implementation)

    def both_ways(*arrays):
        return run(*arrays), gradients(run, arrays)

    expected = compiled(both_ways)(*arrays)
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    heads = NamedSharding(mesh, P(("data", "fsdp"), None, "model", None))
    with jax.set_mesh(mesh):
        placed = tuple(jax.device_put(x, heads) for x in arrays[:3]) + arrays[3:]
        found = compiled(both_ways)(*placed)
    assert_close(found, expected)
    for array in (found[0], *found[1][:3]):
        assert array.sharding.shard_shape(array.shape)[0] == 1


def directions(arrays):
    rng = np.random.default_rng(8)
    return tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in arrays)


@pytest.mark.parametrize("name", ["mask_dense", "softcap", "everything"])
def test_forward_mode_on_the_reference(name):
    """The directional derivative both ways: <dout, J v> = <J^T dout, v>."""
    run, arrays = call(name, "reference")
    tangents, dout = directions(arrays), cotangent(run, arrays)
    _, pushed = compiled(lambda a, v: jax.jvp(run, a, v))(arrays, tangents)
    pulled = compiled(lambda *a: gradients(run, a))(*arrays)
    right = sum(jnp.vdot(g, v) for g, v in zip(pulled, tangents, strict=True))
    np.testing.assert_allclose(jnp.vdot(dout, pushed), right, rtol=1e-4)
    assert np.isfinite(pushed).all()


def test_forward_mode_is_refused_where_it_is_not_served():
    run, arrays = call("plain", "chunked")
    with pytest.raises(TypeError, match=r"forward-mode .*custom_vjp"):
        jax.jvp(run, arrays, directions(arrays))


@both
@pytest.mark.parametrize("name", [pytest.param("mask_dense", marks=pytest.mark.slow), "everything"])
def test_second_order(name, implementation):
    """The Hessian along a direction against differences of float64 gradients."""
    run, arrays = call(name, implementation)
    tangents = directions(arrays)
    along = lambda a: sum(jnp.vdot(g, v) for g, v in zip(gradients(run, a), tangents, strict=True))
    ours = compiled(jax.grad(along))(arrays)
    with jax.enable_x64(True):
        exact, _ = call(name, "reference")
        wide = tuple(jnp.asarray(np.asarray(x), jnp.float64) for x in arrays)
        shift = lambda sign: tuple(
            x + sign * STEP * np.asarray(v, np.float64) for x, v in zip(wide, tangents, strict=True)
        )
        slope = compiled(lambda a: gradients(exact, a))
        slopes = [slope(shift(sign)) for sign in (1, -1)]
        expected = jax.tree.map(lambda a, b: np.asarray(a - b) / (2 * STEP), *slopes)
    assert_close(ours, expected, SECOND_ORDER)


@both
def test_gradients_of_empty_rows_are_finite_to_second_order(implementation):
    run, arrays = call("mask_empty_example", implementation)
    loss = lambda a: jnp.sum(run(*a) ** 2)
    first = compiled(jax.grad(loss))(arrays)
    second = compiled(jax.grad(lambda a: sum(jnp.sum(g**2) for g in jax.grad(loss)(a))))(arrays)
    for gradient in (*first, *second):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[0], 0)
        assert np.abs(gradient[1]).max() > 0


def test_chunked_never_holds_the_scores():
    """Temporary memory of forward and backward is linear in the length; the reference's is not."""
    bytes_of = {}
    for implementation in SERVED:
        for length in (1024, 4096):
            arrays = [jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)] * 3
            run = lambda q, k, v: attention(q, k, v, implementation=implementation)
            loss = jax.grad(lambda a: jnp.sum(run(*a) ** 2))
            program = compiled(loss).lower(tuple(arrays)).compile()
            bytes_of[implementation, length] = program.memory_analysis().temp_size_in_bytes
    growth = {i: bytes_of[i, 4096] / bytes_of[i, 1024] for i in SERVED}
    assert growth["chunked"] < 6 and growth["reference"] > 12
    assert bytes_of["chunked", 4096] < bytes_of["reference", 4096] / 8
