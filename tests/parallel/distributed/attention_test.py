# SPDX-License-Identifier: Apache-2.0
"""Attention on eight devices equals attention on one, however it is divided."""

import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attnjax.ops import EMPTY_LSE, attention, mask, pallas_tpu
from attnjax.ops.normalizers import KeyValueBias, SinkLogit
from attnjax.ops.pallas_tpu_tile import Chip
from attnjax.parallel import DistributedPlan, distributed_attention, make_mesh
from attnjax.parallel.distributed.plan import factorisations

B, N, T, S, H, HV = 2, 4, 37, 45, 8, 6
FORWARD = 1e-5
"""Of float32 numbers of size one; parts are summed in another order."""
GRADIENT = 1e-4
"""Of sums of some dozens of them."""
SLOW = pytest.mark.slow


def arrays(b=B, n=N, k=N, t=T, s=S, dtype=jnp.float32):
    """Query, key, value, and cotangents of output and log-sum-exp."""
    rng = np.random.default_rng(b + n + k + t + s)
    shapes = (b, t, n, H), (b, s, k, H), (b, s, k, HV), (b, t, n, HV), (b, n, t)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def with_gradients(attend):
    """Return a compiled function of the arrays and bounds of the keys of every query."""

    @jax.jit
    def run(arrays, lower, upper):
        *inputs, dout, dlse = arrays

        def loss(*inputs):
            found = attend(*inputs, mask=mask.ranges(lower, upper), return_lse=True)
            lse = jnp.where(found.lse > EMPTY_LSE, found.lse, 0)
            return (found.out * dout).sum() + (lse * dlse).sum(), found

        gradients, found = jax.grad(loss, (0, 1, 2), has_aux=True)(*inputs)
        return found.out, found.lse, gradients

    return run


def bounds(is_causal, t=T, s=S):
    """Bounds `[1,1,1,t]`; with more queries than keys, the first causal rows see nothing."""
    upper = np.arange(t) + s - t + 1 if is_causal else np.full(t, s)
    upper = np.maximum(upper, 0).astype(np.int32).reshape(1, 1, 1, t)
    return np.zeros_like(upper), upper


def assert_same(found, expected):
    (out, lse, gradients), (out_, lse_, gradients_) = found, expected
    np.testing.assert_allclose(out, out_, atol=FORWARD)
    np.testing.assert_allclose(lse, lse_, atol=FORWARD, rtol=FORWARD)
    for one, two in zip(gradients, gradients_, strict=True):
        np.testing.assert_allclose(one, two, atol=GRADIENT)


single = with_gradients(functools.partial(attention, implementation="reference"))


def distributed(plan, **options):
    return functools.partial(distributed_attention, plan=plan, **options)


@pytest.mark.parametrize("ways", factorisations(8), ids=str)
def test_every_split_of_eight(ways):
    """Neither length divides by the number of parts."""
    run = with_gradients(distributed(DistributedPlan(*ways)))
    for is_causal in (True, False):
        case = (arrays(), *bounds(is_causal))
        assert_same(run(*case), single(*case))


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(ways, marks=() if ways == (4, 2, 1) else SLOW)
        for ways in factorisations(8)
        if ways[1] > 1
    ],
    ids=str,
)
def test_every_ring(ways):
    run = with_gradients(distributed(DistributedPlan(*ways, exchange="ring")))
    for is_causal in (True, False):
        case = (arrays(), *bounds(is_causal))
        assert_same(run(*case), single(*case))


@pytest.mark.parametrize(
    "ways",
    [pytest.param(ways, marks=() if ways == (2, 2, 2) else SLOW) for ways in factorisations(8)],
    ids=str,
)
def test_chunked_inside(ways):
    """A static causal mask, more queries than keys: the first rows see nothing."""
    case = arrays(t=S, s=T)
    options = {"mask": mask.causal(), "return_lse": True, "implementation": "chunked"}

    def run(attend):
        def of(query, key, value, dout, dlse):
            def loss(*inputs):
                found = attend(*inputs, **options)
                return (found.out * dout).sum() + (found.lse * dlse).sum(), found

            gradients, found = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
            return found.out, found.lse, gradients

        return jax.jit(of)(*case)

    found = run(distributed(DistributedPlan(*ways)))
    assert_same(found, single(case, *bounds(True, S, T)))
    np.testing.assert_array_equal(found[0][:, : S - T], 0)
    np.testing.assert_array_equal(found[1][:, :, : S - T], np.float32(EMPTY_LSE))


@pytest.mark.parametrize(
    ("n", "k", "examples"),
    [(4, 1, 1), *(pytest.param(*x, marks=SLOW) for x in ((4, 2, 1), (4, 2, 2), (8, 2, 1)))],
)
def test_grouped_heads(n, k, examples):
    """Devices that share a key/value head add up its gradient."""
    run = with_gradients(distributed(DistributedPlan(4 * examples, 2 // examples, 1, examples)))
    case = (arrays(n=n, k=k), *bounds(True))
    assert_same(run(*case), single(*case))


def masks():
    """Name -> mask whose examples or heads differ, and one of each kind that is not intervals."""
    rng = np.random.default_rng(0)
    ids = lambda size: np.sort(rng.integers(0, 3, (B, size)), axis=1)
    some = lambda *shape: rng.random(shape) < 0.7
    position = lambda q, k: (q + 2 * k) % 3 > 0
    segments = mask.segments(ids(T), ids(S))
    return {
        "heads": mask.per_head([mask.sliding_window(size, 0) for size in (1, 5, 9, 40)]),
        "lengths": mask.padding(np.array([45, 7]), np.array([3, 37])),
        "segments": segments & mask.causal(),
        "dense": mask.array(some(B, N, T, S)),
        "rows": mask.array(some(N, T, 1)),
        "blocks": mask.blocks(some(B, N // 2, 3, 3), [12, 12, 13], 15, heads_per_map=2),
        "one map": mask.blocks(some(3, 3), [12, 12, 13], 15, heads_per_map=N),
        "predicate": mask.predicate(position) & mask.causal(),
        "either": mask.predicate(position) | segments,
    }


@pytest.mark.parametrize(
    ("examples", "implementation"),
    [
        (2, "chunked"),
        pytest.param(1, "chunked", marks=SLOW),
        pytest.param(2, "reference", marks=SLOW),
        pytest.param(1, "reference", marks=SLOW),
    ],
)
def test_masks(examples, implementation):
    """Two ways over examples (or none), two over heads, two over queries, the rest over keys."""
    *inputs, _, _ = arrays()
    plan = DistributedPlan(2 * examples, 2, 2 // examples, examples)
    run = lambda attend: jax.jit(
        lambda *inputs: {name: attend(*inputs, mask=seen) for name, seen in masks().items()}
    )(*inputs)
    found = run(distributed(plan, implementation=implementation))
    expected = run(attention)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=FORWARD, err_msg=name)


def test_masks_that_cannot_be_divided():
    *inputs, _, _ = arrays()
    odd = mask.predicate(lambda q, k: (q + k) % 2 == 0)
    each = mask.per_head([odd, mask.causal(), odd, mask.full()])
    with pytest.raises(ValueError, match="PerHead differs between heads"):
        distributed_attention(*inputs, each, plan=DistributedPlan(4, 2, 1, examples=2))
    plan = DistributedPlan(2, 2, 2, examples=2)
    found = jax.jit(distributed(plan, mask=each))(*inputs)
    expected = jax.jit(functools.partial(attention, mask=each))(*inputs)
    np.testing.assert_allclose(found, expected, atol=FORWARD)
    maps = mask.blocks(np.ones((B, 2, 1, 1), bool), T, S, heads_per_map=2)
    with pytest.raises(ValueError, match="Blocks has 2 maps for the heads, which 4 ways"):
        distributed_attention(*inputs, maps, plan=DistributedPlan(8, examples=2))


@pytest.mark.parametrize("name", ["sink", pytest.param("others", marks=SLOW)])
def test_options(name):
    """Sinks are counted once; caps and scales reach every part; low precision stays."""
    *inputs, _, _ = arrays()
    plan = DistributedPlan(2, 2, 2)
    rng = np.random.default_rng(3)
    random = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    relatives = [SinkLogit(random(N))]
    if name == "others":
        relatives = [KeyValueBias(random(N, H), random(N, HV)), "softmax_one"]
    run = lambda attend: jax.jit(
        lambda *inputs: [
            attend(
                *inputs, normalizer=relative, scale=0.7, softcap=2.0, return_lse=True,
                mask=mask.causal(),
            )
            for relative in relatives
        ]
    )(*inputs)  # fmt: skip
    for found, expected in zip(run(distributed(plan)), run(attention), strict=True):
        np.testing.assert_allclose(found.out, expected.out, atol=FORWARD)
        np.testing.assert_allclose(found.lse, expected.lse, atol=FORWARD)
    low = [x.astype(jnp.bfloat16) for x in inputs]
    out = jax.jit(distributed(plan))(*low)
    assert out.dtype == jnp.bfloat16
    # Parts are rounded once, their sum once more: two roundings of numbers below 1.
    np.testing.assert_allclose(
        out.astype(np.float32), jax.jit(attention)(*low).astype(np.float32), atol=2 * 2**-8
    )


def test_devices_of_the_mesh():
    """Those of a given mesh, or all, also under a mesh with other axes."""
    *inputs, _, _ = arrays()
    expected = jax.jit(attention)(*inputs)
    small = make_mesh({"data": 2, "model": 2}, jax.devices()[2:6])
    out = jax.jit(distributed("queries", mesh=small))(*inputs)
    assert out.sharding.device_set == set(jax.devices()[2:6])
    np.testing.assert_allclose(out, expected, atol=FORWARD)
    whole = make_mesh({"data": 2, "model": 4})
    with jax.set_mesh(whole):
        out = jax.jit(distributed(DistributedPlan(2, 2, 2)))(*inputs)
        np.testing.assert_allclose(out, expected, atol=FORWARD)
    with pytest.raises(ValueError, match="must be a jax"):
        distributed_attention(*inputs, mesh=8)
    with pytest.raises(ValueError, match="inside a shard_map over"):
        jax.shard_map(
            lambda *inputs: distributed_attention(*inputs),
            mesh=small, in_specs=jax.P(), out_specs=jax.P(),
        )(*inputs)  # fmt: skip


def test_lowers_for_devices_that_are_not_there():
    """A million tokens on 256 devices: only lowered."""
    mesh = jax.sharding.AbstractMesh((16, 16), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shape = jax.ShapeDtypeStruct((1, 2**20, 16, 64), jnp.bfloat16)
    run = jax.jit(distributed(None, mesh=mesh, mask=mask.causal(), implementation="chunked"))
    text = run.trace(shape, shape, shape).lower(lowering_platforms=("tpu",)).as_text()
    assert '"heads"=16' in text and '"queries"=16' in text


@pytest.mark.parametrize("exchange", ["gather", pytest.param("ring", marks=SLOW)])
def test_kernels_inside(exchange, monkeypatch):
    """TPU kernels pass the check of varying axes, forward and backward (emulated ones do not)."""
    monkeypatch.setattr(pallas_tpu, "find_chip", lambda: Chip(5, 2**27, 2**20))
    shape = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    plan = DistributedPlan(2, 2, 2, exchange=exchange)
    run = distributed(plan, mask=mask.causal(), implementation="pallas_tpu")
    loss = lambda *inputs: run(*inputs).astype(jnp.float32).sum()
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # The ring attends its own share apart from those that arrive.
    assert text.count("tpu_custom_call") == {"gather": 2, "ring": 4}[exchange]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("diagonal", r"'diagonal' is unknown; choose from \['auto', 'heads', 'queries', 'keys'\]"),
        ((2, 2, 2), "is unknown; choose from"),
        (DistributedPlan(2, 2, 1), "is for 4 devices, but there are 8: the product must be 8"),
        (DistributedPlan(3, 3, 1), "is for 9 devices, but there are 8"),
        (DistributedPlan(0, 8, 1), "plan.heads=0: must be a whole number"),
        (DistributedPlan(8, examples=4), r"plan.heads=8 with plan.examples=4 does not divide 2"),
        (DistributedPlan(1, 8, 1, exchange="mail"), "choose from .*gather.*ring"),
    ],
)
def test_plans_that_mean_nothing(plan, message):
    *inputs, _, _ = arrays()
    with pytest.raises(ValueError, match=message):
        distributed_attention(*inputs, plan=plan)


def test_sizes_that_do_not_divide():
    """Six heads on eight devices, one query for eight, and what is no attention at all."""
    *six, _, _ = arrays(b=1, n=6, k=6)
    with pytest.raises(ValueError, match=r"does not divide 1 examples, 6 query heads .*\[1, 2, 3"):
        distributed_attention(*six, plan="heads")
    np.testing.assert_allclose(  # The planner goes around it: two ways over heads.
        jax.jit(distributed_attention)(*six), jax.jit(attention)(*six), atol=FORWARD
    )
    *one, _, _ = arrays(t=1)
    with pytest.raises(ValueError, match="choose from 1 to the 1 queries"):
        distributed_attention(*one, plan="queries")
    *few, _, _ = arrays(s=4)
    with pytest.raises(ValueError, match="choose a product of at most 4"):
        distributed_attention(*few, plan="keys")
    with pytest.raises(ValueError, match="implementation 'fast' is unknown"):
        distributed_attention(*six, implementation="fast")
    with pytest.raises(NotImplementedError, match="no log-sum-exp to merge by"):
        distributed_attention(*six, normalizer="sigmoid")


def _temporary_bytes(attend, length, has_gradient=False):
    """Temporary bytes on each device, from the compiled program."""
    shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    run = jax.grad(lambda *a: attend(*a).sum(), (0, 1, 2)) if has_gradient else attend
    compiled = jax.jit(run).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("plan", "has_gradient"),
    [
        ("queries", True),
        pytest.param("queries", False, marks=SLOW),
        pytest.param("keys", False, marks=SLOW),
        pytest.param("keys", True, marks=SLOW),
    ],
)
def test_memory_is_linear_in_the_length(plan, has_gradient):
    """At a fixed tile; a byte per score would not fit on a device."""
    run = distributed(plan, mask=mask.causal(), implementation="chunked")
    small, large = (_temporary_bytes(run, x, has_gradient) for x in (8192, 16384))
    assert large <= 2.3 * small
    assert large < 16384**2 / 8


def test_memory_of_vanilla_is_quadratic():
    vanilla = functools.partial(attention, implementation="reference")
    small, large = (_temporary_bytes(vanilla, length) for length in (1024, 2048))
    assert large >= 3.5 * small


@SLOW
def test_long_run():
    """131,072 tokens on these devices: sampled rows equal float64, scores never exist."""
    length, h = 2**17, 16
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, length, 1, h), np.float32) for _ in range(3))
    run = jax.jit(distributed("queries", implementation="chunked")).lower(query, key, value)
    compiled = run.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2 / 100
    out = np.asarray(compiled(query, key, value))[0, :, 0]
    rows = np.concatenate([[0, length - 1], rng.integers(0, length, 30)])
    scores = query[0, rows, 0].astype(np.float64) @ key[0, :, 0].astype(np.float64).T / h**0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights @ value[0, :, 0].astype(np.float64) / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[rows], expected, atol=1e-4)


def test_example_of_the_module():
    module = importlib.import_module("attnjax.parallel.distributed.attention")
    assert doctest.testmod(module).failed == 0
