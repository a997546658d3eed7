# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels, emulated on CPU against `reference`, and lowered for CUDA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import TokenMass, attention, mask, pallas_gpu
from attnjax.ops.bias import Bias
from attnjax.ops.cases import CASES
from attnjax.ops.normalizer import EMPTY_LSE, SoftmaxFamily
from attnjax.ops.normalizers import SinkLogit
from attnjax.ops.pallas_gpu import Tiles

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Of the largest reference value: rounding of the inputs' dtype, in sums of a hundred terms."""

SMALL = Tiles(forward=(32, 16), backward=(16, 32), forward_warps=4, backward_warps=4)
"""Tiles so small that short sequences have EMPTY, PARTIAL and FULL ones."""

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Emulated kernels take longer to compile than to run."""

STATISTICS = ("key_mass", "entropy", "max_probability", "first_token_mass")


@pytest.fixture
def emulate(monkeypatch):
    """Let `attention` emulate the kernels, with small tiles unless told otherwise."""
    original = pallas_gpu.attend

    def use(tiles=SMALL, interpret=True):
        attend = functools.partial(original, tiles=tiles, interpret=interpret)
        monkeypatch.setattr(pallas_gpu, "attend", attend)

    use()
    return use


def draw(seed, b, t, s, n, k, h, hv=None, dtype="float32", size=1.0):
    """Return query, key, value and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, hv or h), (b, t, n, hv or h))
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    return arrays[0] * size, *arrays[1:]


def outputs_and_gradients(implementation, arrays, bias=None, **options):
    """Return everything that comes out of a call, and gradients through out and lse."""
    *inputs, cotangent = arrays

    def loss(inputs, bias):
        output = attention(
            *inputs, bias=bias, implementation=implementation, return_lse=True, **options
        )
        lse = jnp.where(output.lse > EMPTY_LSE / 2, output.lse, 0)
        wide = output.out.astype(jnp.float32)
        return (wide * cotangent).sum() + (lse * cotangent[..., 0].swapaxes(1, 2)).sum(), output

    gradients, output = jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, bias)
    named = dict(zip(("dquery", "dkey", "dvalue"), gradients[0], strict=True))
    if bias is not None:
        named["dbias"] = gradients[1]
    return {"out": output.out, "lse": output.lse} | named | dict(output.statistics)


def check(arrays, bias=None, **options):
    """Compare emulated kernels with the reference; return what the kernels gave."""
    tolerance = TOLERANCE[arrays[0].dtype.name]
    run = lambda name: jax.jit(
        lambda arrays, bias: outputs_and_gradients(name, arrays, bias, **options),
        compiler_options=QUICKLY,
    )(arrays, bias)
    expected, found = run("reference"), run("pallas_gpu")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        value, other = (np.asarray(x, np.float64) for x in (value, found[name]))
        # Row by row an empty lse of -1e30 would hide everything else.
        largest = np.abs(np.where(value > EMPTY_LSE / 2, value, 0)).max()
        np.testing.assert_allclose(
            other, value, rtol=tolerance, atol=tolerance * max(1, largest), err_msg=name
        )
    return found


def ids(rng, b, t):
    return np.sort(rng.integers(0, 4, (b, t)), axis=1)


MASKS = {
    "full": lambda rng, t: None,
    "causal": lambda rng, t: mask.causal(),
    "window": lambda rng, t: mask.sliding_window(9, 4),
    "documents": lambda rng, t: mask.documents([t // 3, t - t // 3], causal=True),
    "global": lambda rng, t: mask.global_sliding_window(20, 5),
    "segments": lambda rng, t: mask.causal() & mask.segments(ids(rng, 2, t), ids(rng, 2, t)),
    "array": lambda rng, t: mask.array(rng.random((2, 1, t, t)) < 0.3),
    "heads": lambda rng, t: mask.per_head(
        [mask.causal(), mask.global_sliding_window(4, 2), mask.full(), mask.sliding_window(3, 0)]
    ),
    "blocks": lambda rng, t: mask.blocks(rng.random((1, 4, 5, 5)) < 0.5, [14] * 5, [14] * 5),
    "prefix": lambda rng, t: mask.prefix_lm(30),
    "share_question": lambda rng, t: mask.share_question([t // 2, t // 4, t - t // 2 - t // 4]),
    "causal_blockwise": lambda rng, t: mask.causal_blockwise([t // 2, t - t // 2]),
    "block_causal": lambda rng, t: mask.block_causal_document([t // 2, t - t // 2], 8),
    "predicate": lambda rng, t: mask.predicate(lambda q, k: (q + k) % 3 == 0),
}  # fmt: skip
QUICK = ("segments", "array", "heads")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MASKS],
)
def test_masks(emulate, name):
    """GQA, lengths that are no multiple of a tile, in one go with every mask."""
    made = MASKS[name](np.random.default_rng(0), 70)
    check(draw(1, 2, 70, 70, 4, 2, 16), mask=made)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_cases(emulate, name):
    """Every case of the core: served as the reference does, or refused by name."""
    case = {case.name: case for case in CASES}[name]
    emulate(None if case.t > 100 else SMALL)
    arrays = case.arrays()
    options = case.options()
    cotangent = jnp.asarray(
        np.random.default_rng(0).standard_normal((*arrays[0].shape[:3], case.hv)), jnp.float32
    )
    is_softmax = isinstance(options.get("normalizer", SoftmaxFamily()), SoftmaxFamily)
    if not is_softmax or isinstance(options.get("bias"), Bias):
        with pytest.raises(NotImplementedError, match=r"pallas_gpu: (normalizer|bias objects)"):
            attention(*arrays, implementation="pallas_gpu", **options)
    else:
        check((*arrays, cotangent), **options)


SHAPES = {
    "one": dict(t=1, s=1, n=2, k=1, h=8),
    "decode": dict(t=1, s=50, n=4, k=2, h=16),
    "width_72_values_40": dict(t=40, s=40, n=2, k=2, h=72, hv=40),
    "t_200": dict(t=200, s=200, n=2, k=1, h=16, tiles=None),
    "more_queries": dict(t=90, s=33, n=2, k=2, h=24),
    "width_256": dict(t=33, s=33, n=1, k=1, h=256, tiles=None),
    "width_160": dict(t=20, s=47, n=2, k=1, h=160, hv=96, tiles=None),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("one", "width_72_values_40", "t_200")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in SHAPES
    ],
)  # fmt: skip
def test_shapes(emulate, name):
    shape = dict(SHAPES[name])
    emulate(shape.pop("tiles", SMALL))
    check(draw(2, 1, **shape), mask=mask.causal())


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_dtypes(emulate, dtype):
    check(draw(3, 1, 40, 40, 2, 1, 16, dtype=dtype), mask=mask.causal(), softcap=4.0)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 4, 40, 50),
        (2, 1, 1, 50),
        pytest.param((1, 1, 40, 50), marks=pytest.mark.slow),
        pytest.param((2, 4, 40, 50), marks=pytest.mark.slow),
        pytest.param((1, 4, 40, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_bias(emulate, shape):
    """A bias of any shape, with rows of nothing but -inf, and a negative scale."""
    bias = np.random.default_rng(4).standard_normal(shape).astype("float32")
    if shape[2] > 1 and shape[3] > 1:
        bias[:, :, 3] = -np.inf
    arrays = draw(5, 2, 40, 50, 4, 2, 16)
    found = check(arrays, jnp.asarray(bias), mask=mask.causal(), softcap=3.0, scale=-0.4)
    assert found["dbias"].shape == shape


def test_large_logits(emulate):
    """Scores of exactly -10,000 and 10,000, many of them equal: every digit survives."""
    rng = np.random.default_rng(6)
    signs = lambda *shape: jnp.asarray(
        np.eye(16)[0] * rng.choice([-200, 200], (*shape, 1)), "float32"
    )
    value, cotangent = draw(6, 1, 40, 40, 2, 1, 16)[2:]
    check((signs(1, 40, 2), signs(1, 40, 1), value, cotangent), mask=mask.causal())


def test_rows_that_see_nothing(emulate):
    """Also whole tiles of them, and whole examples: zeros, and zero gradients."""
    made = mask.padding(np.array([40, 0]), np.array([19, 40]))
    found = check(draw(7, 2, 40, 40, 2, 1, 16), mask=made, statistics=STATISTICS)
    assert (found["lse"][0, :, 19:] == EMPTY_LSE).all() and (found["lse"][1] == EMPTY_LSE).all()
    for name in ("out", "dquery", "dkey", "dvalue"):
        assert not np.asarray(found[name][1]).any()
    assert not np.asarray(found["out"][0, 19:]).any()


def test_statistics(emulate):
    rng = np.random.default_rng(8)
    wanted = (
        *STATISTICS,
        TokenMass(rng.random((2, 50)) < 0.3),
        TokenMass(rng.random((1, 50)), "w"),
    )
    made = mask.causal() & mask.segments(ids(rng, 2, 50), ids(rng, 2, 50))
    check(
        draw(9, 2, 50, 50, 2, 1, 16),
        mask=made,
        statistics=wanted,
        normalizer=SinkLogit(jnp.asarray([0.5, -3.0])),
    )


@pytest.mark.slow
def test_statistics_of_plain_softmax(emulate):
    check(draw(9, 1, 50, 50, 2, 1, 16, size=3.0), statistics=STATISTICS, softcap=20.0)


def test_dropout_drops_the_same_weights(emulate):
    options = dict(dropout_rate=0.3, dropout_key=jax.random.key(0))
    check(draw(10, 2, 40, 40, 2, 1, 16), mask=mask.causal(), **options)


def test_other_boundaries_run_the_same_program(emulate):
    query, key, value, _ = draw(11, 1, 64, 64, 2, 1, 16)
    jitted = pallas_gpu._attend_jit
    jitted.clear_cache()
    for lengths in ([20, 44], [64], [1, 2, 3, 58]):
        made = mask.documents(lengths, causal=True)
        both = [
            attention(query, key, value, mask=made, implementation=name)
            for name in ("reference", "pallas_gpu")
        ]
        np.testing.assert_allclose(both[1], both[0], rtol=2e-5, atol=2e-5)
    assert jitted._cache_size() == 1


def test_vmap(emulate):
    query, key, value, _ = draw(12, 3, 24, 24, 2, 1, 16)
    apply = lambda name: jax.vmap(
        lambda q, k, v: attention(q[None], k[None], v[None], implementation=name)[0]
    )(query, key, value)
    np.testing.assert_allclose(apply("pallas_gpu"), apply("reference"), rtol=2e-5, atol=2e-5)


def sharded(mesh, *spec):
    return NamedSharding(mesh, P(*spec))


def test_sharded_examples_and_heads_stay_sharded(emulate):
    """Nothing is gathered, dropout and a shared bias's gradient are those of one device."""
    devices = jax.devices()[:4]
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )
    arrays = draw(13, 4, 20, 20, 4, 2, 16)
    bias = jnp.asarray(np.random.default_rng(14).standard_normal((1, 4, 20, 20)), jnp.float32)
    segments = jnp.asarray(ids(np.random.default_rng(15), 4, 20))

    def run(implementation, arrays, bias, segments):
        return outputs_and_gradients(
            implementation, arrays, bias, mask=mask.causal() & mask.segments(segments, segments),
            dropout_rate=0.2, dropout_key=jax.random.key(0),
        )  # fmt: skip

    program = jax.jit(run, static_argnums=0, compiler_options=QUICKLY)
    expected = program("reference", arrays, bias, segments)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, sharded(mesh, "data", None, "model")) for x in arrays]
        segments = jax.device_put(segments, sharded(mesh, "data"))
        compiled = program.lower("pallas_gpu", arrays, bias, segments).compile()
        found = compiled(arrays, bias, segments)
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    for name in ("out", "dquery", "dkey", "dvalue"):
        assert found[name].sharding.spec == P("data", None, "model")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_inside_shard_map(emulate):
    """Emulation fails JAX's check of varying axes; lowered kernels must pass it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    query, key, value, _ = draw(16, 2, 20, 20, 2, 1, 16)
    apply = functools.partial(attention, mask=mask.causal(), implementation="pallas_gpu")
    mapped = lambda check: jax.jit(
        jax.shard_map(
            apply, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check
        )
    )  # fmt: skip
    reference = jax.jit(
        functools.partial(attention, mask=mask.causal(), implementation="reference")
    )
    expected = reference(query, key, value)
    np.testing.assert_allclose(mapped(False)(query, key, value), expected, rtol=2e-5, atol=2e-5)
    emulate(interpret=False)
    text = mapped(True).trace(query, key, value).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_forward" in text


LOWERED = {
    "full": dict(h=64),
    "causal": dict(h=128, mask=lambda: mask.causal()),
    "window": dict(h=128, mask=lambda: mask.sliding_window(64, 0)),
    "documents": dict(h=64, mask=lambda: mask.documents([100, 156], causal=True)),
    "segments": dict(h=64, mask=lambda: mask.segments(np.zeros((2, 256), int), np.ones(256, int))),
    "global": dict(h=64, mask=lambda: mask.global_sliding_window(64, 8), softcap=30.0),
    "array": dict(h=64, mask=lambda: mask.array(np.tri(256, dtype=bool))),
    "ragged": dict(h=64, t=200, mask=lambda: mask.causal()),
    "one_query": dict(h=64, t=1, s=300),
    "float32": dict(h=64, dtype="float32", mask=lambda: mask.causal()),
    "float16": dict(h=80, dtype="float16", mask=lambda: mask.causal()),
    "width_8": dict(h=8),
    "width_256": dict(h=256, mask=lambda: mask.causal()),
    "values_40": dict(h=64, hv=40),
    "bias": dict(h=64, bias=(1, 4, 256, 256)),
    "bias_keys": dict(h=64, bias=(2, 1, 1, 256), mask=lambda: mask.causal()),
    "bias_queries": dict(h=64, bias=(1, 1, 256, 1)),
    "statistics": dict(h=64, statistics=(*STATISTICS, TokenMass(np.ones((1, 256), bool)))),
    "dropout": dict(h=64, dropout_rate=0.1),
}


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda(emulate, name):
    """Forward and backward become Triton kernels; no GPU and no CUDA package is needed."""
    emulate(tiles=None, interpret=False)
    case = dict(LOWERED[name])
    h, dtype, bias = case.pop("h"), case.pop("dtype", "bfloat16"), case.pop("bias", None)
    t = case.pop("t", 256)
    s, hv = case.pop("s", t), case.pop("hv", h)
    shapes = ((2, t, 4, h), (2, s, 2, h), (2, s, 2, hv))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    if bias is not None:
        arrays.append(jax.ShapeDtypeStruct(bias, jnp.float32))
    if "mask" in case:
        case["mask"] = case["mask"]()
    if "dropout_rate" in case:
        case["dropout_key"] = jax.random.key(0)

    def loss(query, key, value, bias=None):
        output = attention(
            query, key, value, bias=bias, implementation="pallas_gpu", return_lse=True, **case
        )
        return output.out.astype(jnp.float32).sum() + output.lse.sum(), output.statistics

    gradient = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)
    traced = jax.jit(gradient).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = set(re.findall(r'name = "(\w+)"', text))
    expected = {"attention_forward", "attention_backward_keys", "attention_backward_queries"}
    if bias is not None and min(bias[2:]) > 1:
        expected.add("attention_backward_bias")
    if "statistics" in case:
        expected.add("attention_key_mass")
    assert kernels == expected
    assert text.count("xla.gpu.triton") == len(expected)


def test_lowers_with_64_bits(emulate):
    """Python's integers become 64 bits wide; the kernels' do not."""
    emulate(interpret=False)
    arrays = [jax.ShapeDtypeStruct((1, 40, 2, 16), "float32")] * 3
    loss = lambda *x: attention(*x, mask=mask.causal(), implementation="pallas_gpu").sum()
    with jax.enable_x64(True):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 3


def test_unused_gradients_of_a_bias_cost_nothing(emulate):
    """Without a gradient for the bias its kernel is removed by the compiler."""
    query, key, value, _ = draw(17, 1, 32, 32, 1, 1, 16)
    bias = jnp.zeros((1, 1, 32, 32))
    loss = lambda q: attention(q, key, value, bias=bias, implementation="pallas_gpu").sum()
    emulate(interpret=False)
    jaxpr = jax.make_jaxpr(jax.jit(jax.grad(loss)))(query)
    pruned = jax.jit(jax.grad(loss)).trace(query).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_backward_bias" in str(jaxpr)
    assert "attention_backward_bias" not in pruned


def test_second_derivatives_are_refused(emulate):
    query, key, value, _ = draw(18, 1, 16, 16, 1, 1, 16)
    loss = lambda q: attention(q, key, value, implementation="pallas_gpu").sum()
    with pytest.raises(NotImplementedError, match="second derivatives are not served"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(query)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (query,), (query,))


REFUSED = {
    "return_probabilities": dict(return_probabilities=True),
    "return_scores": dict(return_scores=[0]),
    "edit": dict(edit=lambda p: p),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(emulate, name):
    query, key, value, _ = draw(19, 1, 16, 16, 1, 1, 16)
    with pytest.raises(NotImplementedError, match=f"pallas_gpu: {name} is not served"):
        attention(query, key, value, implementation="pallas_gpu", **REFUSED[name])


def test_refuses_shapes_and_dtypes(emulate):
    wide = draw(20, 1, 16, 16, 1, 1, 264)[:3]
    with pytest.raises(NotImplementedError, match="wider than 256"):
        attention(*wide, implementation="pallas_gpu")
    bias = jax.ShapeDtypeStruct((1, 1, 16, 16), "float8_e5m2")
    narrow = draw(20, 1, 16, 16, 1, 1, 16)[:3]
    apply = lambda bias: attention(*narrow, bias=bias, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="float8_e5m2 bias"):
        jax.eval_shape(apply, bias)
    empty = draw(20, 0, 16, 16, 1, 1, 16)[:3]
    with pytest.raises(NotImplementedError, match="empty batch"):
        attention(*empty, implementation="pallas_gpu")
    huge = [jax.ShapeDtypeStruct((1, 65_536, 1, 16), "bfloat16")] * 3
    apply = lambda m, *x: attention(*x, mask=mask.array(m), implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="mask of 4294967296 elements"):
        jax.eval_shape(apply, jax.ShapeDtypeStruct((1, 1, 65_536, 1), bool), *huge)


def test_needs_a_gpu():
    query, key, value, _ = draw(21, 1, 16, 16, 1, 1, 16)
    with pytest.raises(NotImplementedError, match="pallas_gpu: needs a GPU, not cpu"):
        attention(query, key, value, implementation="pallas_gpu")


def test_automatic_choice(emulate, monkeypatch):
    """On a GPU the kernels come first, except for a few queries."""
    served = []
    attend = pallas_gpu.attend
    record = lambda call: served.append(call.query.shape[1]) or attend(call)
    monkeypatch.setattr(pallas_gpu, "attend", record)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for t in (1, 24):
        attention(*draw(22, 1, t, 24, 1, 1, 16)[:3])
    assert served == [24]
