# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels, emulated on CPU, against the reference."""

import dataclasses
import functools
import re

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import TokenMass, attention, mask, pallas_tpu
from attnjax.ops.cases import CASES
from attnjax.ops.pallas_tpu_tile import Chip, Plan, Tiles, choose_tiles, make_tables
from attnjax.parallel import make_mesh

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest difference over largest entry: the core's own, see core_test.py."""
STATISTICS = 1e-5
SMALL = Tiles(128, 128, 128)
BY_NAME = {case.name: case for case in CASES}
T = 200


def quick(names, few):
    """Parameters of which all but a few are for slow runs."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, and several stretches of keys, at lengths that can be emulated."""
    monkeypatch.setattr(pallas_tpu, "choose_tiles", lambda *_, **__: SMALL)


def draw(*shapes, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def both(arrays, bias=None, how=True, **options):
    """Output, lse and gradients by the reference and by the kernels."""
    b, t, n, _ = arrays[0].shape
    dout, dlse = draw((b, t, n, arrays[2].shape[3]), (b, n, t), seed=1)
    biases = () if bias is None else (bias,)

    def loss(arrays, biases, implementation):
        named = {"bias": biases[0]} if biases else {}
        found = attention(
            *arrays, **named, **options, implementation=implementation, return_lse=True
        )
        lse = jnp.where(found.lse > -1e29, found.lse, 0)
        return (found.out * dout).sum() + (lse * dlse).sum(), (found.out, found.lse)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    wanted = jax.jit(run, static_argnums=2)(arrays, biases, "reference")
    with pallas_tpu.interpreted(how):
        found = run(arrays, biases, "pallas_tpu")
    return found, wanted


def compare(found, wanted, tolerance):
    (_, (out, lse)), gradients = found
    (_, (wanted_out, wanted_lse)), wanted_gradients = wanted
    is_empty = np.asarray(wanted_lse) < -1e29
    np.testing.assert_array_equal(np.asarray(lse) < -1e29, is_empty)
    pairs = [(np.where(is_empty, 0, lse), np.where(is_empty, 0, wanted_lse)), (out, wanted_out)]
    leaves = zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True)
    for ours, theirs in (*pairs, *leaves):
        assert jnp.asarray(ours).dtype == jnp.asarray(theirs).dtype
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-3)


def qkv(b=1, t=T, s=T, n=2, k=1, h=8, hv=8, dtype=jnp.float32):
    return draw((b, t, n, h), (b, s, k, h), (b, s, k, hv), dtype=dtype)


LENGTHS = (90, 40, 70)
INTERVALS = {
    "causal": mask.causal(),
    "window": mask.sliding_window(30, 0),
    "window_both": mask.sliding_window(7, 90),
    "documents": mask.documents(LENGTHS, causal=True),
    "documents_full": mask.documents(LENGTHS, causal=False),
    "documents_end_early": mask.documents((60, 60), causal=True),
    "prefix": mask.prefix_lm(50),
    "prefix_documents": mask.prefix_lm_documents(LENGTHS, 20),
    "share_question": mask.share_question(LENGTHS),
    "causal_blockwise": mask.causal_blockwise(LENGTHS),
    "block_causal": mask.block_causal_document(LENGTHS, 16),
    "global_window": mask.global_sliding_window(20, 10),
    "nothing": mask.documents((1,), causal=True) & mask.sliding_window(0, 0),
    "ranges": mask.ranges(
        np.arange(T) // np.array([[2], [1], [1]])[None, None] + np.array([[0], [-9], [20]]),
        np.full((1, 1, 3, T), T) - np.array([[180], [110], [30]]),
    ),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_interval_masks(name, small_tiles):
    compare(*both(qkv(), mask=INTERVALS[name]), TOLERANCE["float32"])


def test_everything_is_visible():
    compare(*both(qkv(t=128, s=256)), TOLERANCE["float32"])


RUNTIME = {
    "segments": lambda rng: mask.segments(*(jnp.asarray(rng.integers(0, 3, (2, T))),) * 2),
    "sorted_segments": lambda rng: (
        mask.segments(*(jnp.asarray(np.sort(rng.integers(0, 9, (2, T)))),) * 2) & mask.causal()
    ),
    "padding": lambda rng: mask.padding(jnp.array([3, 150]), jnp.array([190, 100])),
    "dense": lambda rng: mask.array(jnp.asarray(rng.random((2, 2, T, T)) < 0.5)),
    "dense_row": lambda rng: mask.array(rng.random((2, 1, 1, T)) < 0.5),
    "blocks": lambda rng: mask.blocks(rng.random((2, 5, 10)) < 0.5, 40, 20),
    "predicate": lambda rng: mask.predicate(lambda query, key: (query + key) % 3 != 0),
    "heads": lambda rng: mask.per_head([mask.causal(), mask.sliding_window(9, 0)]),
    "either": lambda rng: mask.sliding_window(9, 0) | mask.array(rng.random((T, T)) < 0.1),
    "empty_tiles": lambda rng: mask.array(np.arange(T)[:, None] < [3] * T),
}


@pytest.mark.parametrize("name", quick(RUNTIME, ("sorted_segments", "either")))
def test_other_masks(name, small_tiles):
    chosen = RUNTIME[name](np.random.default_rng(0))
    compare(*both(qkv(b=2), mask=chosen), TOLERANCE["float32"])


def test_memory_as_on_a_chip(monkeypatch):
    """Uninitialised memory is NaN, and reads beyond an array raise."""
    tiles = Tiles(128, 128, 256)
    monkeypatch.setattr(pallas_tpu, "choose_tiles", lambda *_, **__: tiles)
    arrays = qkv(b=2, t=130, s=300, n=4, k=2, h=40, hv=72)
    chosen = mask.causal() & mask.segments(*(np.arange(size)[None] // 60 for size in (130, 300)))
    how = pltpu.InterpretParams()
    compare(*both(arrays, how=how, mask=chosen), TOLERANCE["float32"])


BIASES = [(2, 2, T, T), (1, 2, T, T), (2, 1, 1, T), (1, 2, T, 1)]


@pytest.mark.parametrize("shape", quick(BIASES, BIASES[1::2]))
def test_bias_and_its_gradient(shape, small_tiles):
    (bias,) = draw(shape, seed=2)
    compare(*both(qkv(b=2), bias, mask=mask.causal(), softcap=2.0), TOLERANCE["float32"])


def test_bias_that_hides(small_tiles):
    (bias,) = draw((1, 1, T, T), seed=2)
    bias = jnp.where(bias > 1, -jnp.inf, bias).at[:, :, 7].set(-jnp.inf)
    compare(*both(qkv(), bias), TOLERANCE["float32"])


def test_dropout(small_tiles):
    options = dict(dropout_rate=0.3, dropout_key=jax.random.key(3), mask=mask.causal())
    compare(*both(qkv(b=2), **options), TOLERANCE["float32"])


def test_bfloat16(small_tiles):
    arrays = qkv(dtype=jnp.bfloat16, h=64, hv=64)
    compare(*both(arrays, mask=mask.causal()), TOLERANCE["bfloat16"])


def test_transposed_gradient_of_the_query(small_tiles, monkeypatch):
    """The form for chips with wide matrix units."""
    monkeypatch.setattr(pallas_tpu, "find_chip", lambda: Chip(6, 2**27, 2**20))
    compare(*both(qkv(), mask=mask.causal()), TOLERANCE["float32"])


STATISTIC_OPTIONS = {
    "plain": {},
    "softmax_one": {"normalizer": "softmax_one"},
    "with_empty_rows": {"mask": mask.documents((60, 60), causal=True)},
}


@pytest.mark.parametrize("name", quick(STATISTIC_OPTIONS, ("softmax_one",)))
def test_statistics(name, small_tiles):
    options = {"mask": mask.causal(), **STATISTIC_OPTIONS[name]}
    statistics = (
        "entropy", "key_mass", "max_probability", "first_token_mass",
        TokenMass(np.arange(T)[None] % 3 == 0, "thirds"),
        TokenMass(draw((2, T), seed=4)[0], "weighted"),
    )  # fmt: skip
    arrays = qkv(b=2)
    run = functools.partial(attention, *arrays, statistics=statistics, **options)
    wanted = run(implementation="reference").statistics
    with pallas_tpu.interpreted():
        found = run(implementation="pallas_tpu").statistics
        gradient = jax.grad(
            lambda query: sum(
                x.sum()
                for x in attention(
                    query, *arrays[1:], implementation="pallas_tpu",
                    statistics=("entropy",), **options,
                ).statistics.values()
            )
        )(arrays[0])  # fmt: skip
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, atol=STATISTICS * max(1, value.max()))
    assert not gradient.any()


def test_new_boundaries_compile_nothing(small_tiles):
    arrays = qkv()
    with pallas_tpu.interpreted():
        run = lambda lengths: attention(
            *arrays, mask=mask.documents(lengths, causal=True), implementation="pallas_tpu"
        )
        run((90, 40, 70))
        before = pallas_tpu._attend_jit._cache_size()
        run((20, 150, 30))
        run((1, 1, 100))
        assert pallas_tpu._attend_jit._cache_size() == before


def make_plan(t, s, tiles, **changes):
    plan = Plan(tiles, (t, s, 8, 8), 1.0, None, 0.0, Chip(5, 2**27, 2**20), True, *(False,) * 3)
    return dataclasses.replace(plan, **changes)


def listed(tables, prefix="", b=0, n=0, stretch=0):
    """The steps of a schedule as (query tile, key tile, kind, first, last, bits)."""
    codes, bits = (np.asarray(tables[prefix + name])[b, n, stretch] for name in ("codes", "bits"))
    steps = []
    for code, part in zip(codes, bits, strict=True):
        kind = code >> 2 & 3
        steps.append((code >> 18, code >> 6 & 4095, kind, code & 1, code >> 1 & 1, part))
    return steps


def test_schedule_of_causal_tiles():
    tables = make_tables(
        mask.causal().visibility(512, 512), make_plan(512, 512, Tiles(256, 256, 512))
    )
    assert int(tables["count"]) == 3
    assert [step[:5] for step in listed(tables)[:3]] == [
        (0, 0, mask.PARTIAL, 1, 1), (1, 0, mask.FULL, 1, 0), (1, 1, mask.PARTIAL, 0, 1)
    ]  # fmt: skip
    # The one step that is left over does nothing where the last one was.
    assert listed(tables)[3][:5] == (1, 1, mask.EMPTY, 0, 0)


def test_parts_of_a_tile_above_the_diagonal_are_skipped():
    plan = make_plan(1024, 1024, Tiles(1024, 1024, 1024))
    tables = make_tables(mask.causal().visibility(1024, 1024), plan)
    assert listed(tables) == [(0, 0, mask.PARTIAL, 1, 1, 0b1101)]


def test_each_stretch_has_a_schedule():
    plan = make_plan(512, 512, Tiles(128, 128, 256))
    tables = make_tables(mask.sliding_window(0, 0).visibility(512, 512), plan)
    assert int(tables["stretch_count"]) == 4
    kinds = [[step[:3] for step in listed(tables, "stretch_", stretch=i)[:4]] for i in range(2)]
    partial, empty = mask.PARTIAL, mask.EMPTY
    assert kinds[0] == [(0, 0, partial), (1, 1, partial), (2, 0, empty), (3, 0, empty)]
    assert kinds[1] == [(0, 2, empty), (1, 2, empty), (2, 2, partial), (3, 3, partial)]


def test_traced_schedules_equal_static_ones():
    plan = make_plan(300, 300, Tiles(128, 128, 256))
    static = mask.documents((90, 110), causal=True).visibility(300, 300)
    wanted = make_tables(static, plan)
    found = jax.jit(lambda lower, upper: make_tables(
        dataclasses.replace(static, lower=lower, upper=upper), plan
    ))(static.lower, static.upper)  # fmt: skip
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_long_static_schedule_is_quick_and_exact():
    plan = make_plan(2**17, 2**17, Tiles(1024, 1024, 2**14))
    tables = make_tables(mask.causal().visibility(2**17, 2**17), plan)
    assert int(tables["count"]) == 128 * 129 // 2


def test_a_schedule_beyond_scalar_memory_is_refused():
    plan = make_plan(2**14, 2**14, Tiles(128, 128, 2**14))
    chosen = mask.per_head([mask.causal()] * 16).visibility(2**14, 2**14)
    with pytest.raises(NotImplementedError, match="scalar memory"):
        make_tables(chosen, plan)


@pytest.mark.parametrize("chip", [Chip(4, 2**24, 2**20), Chip(6, 2**27, 2**20)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(1, 1), (200, 1157), (4096, 8192), (2**17, 2**17)])
def test_chosen_tiles_waste_little(lengths, dtype, chip):
    tiles = choose_tiles((*lengths, 128, 128), dtype, chip)
    for size, tile in zip(lengths, (tiles.queries, tiles.keys), strict=True):
        assert -size % tile < max(128, size / 4)
    held = tiles.resident * 256 * (4 + 2 * jnp.dtype(dtype).itemsize)
    assert held <= chip.vmem


def test_automatic_choice(monkeypatch):
    """On a TPU the kernels come first, except for a few queries and for what they refuse."""
    served = []
    attend = pallas_tpu.attend
    record = lambda call: served.append(call.query.shape[1]) or attend(call)
    monkeypatch.setattr(pallas_tpu, "attend", record)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pallas_tpu.interpreted():
        for t in (1, 24):
            attention(*qkv(t=t, s=24))
        assert served == [24]
        attention(*qkv(t=24, s=24, dtype=jnp.float16))
    assert served == [24, 24]


def test_no_tpu_is_a_refusal():
    with pytest.raises(NotImplementedError, match="pallas_tpu: the backend is 'cpu'"):
        attention(*qkv(), implementation="pallas_tpu")


REFUSED = {
    "normalizer": {"normalizer": "sigmoid"},
    "probabilities": {"return_probabilities": True},
    "scores": {"return_scores": [0]},
    "edit": {"edit": lambda p: p},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_option(name):
    with (
        pallas_tpu.interpreted(),
        pytest.raises(NotImplementedError, match=rf"pallas_tpu: .*{name}"),
    ):
        attention(*qkv(), implementation="pallas_tpu", **REFUSED[name])


def test_float16_is_refused():
    with pallas_tpu.interpreted(), pytest.raises(NotImplementedError, match="float16"):
        attention(*qkv(dtype=jnp.float16), implementation="pallas_tpu")


def test_higher_derivatives_are_refused():
    query, key, value = qkv(t=8, s=8)
    run = lambda query: attention(query, key, value, implementation="pallas_tpu").sum()
    with pallas_tpu.interpreted():
        with pytest.raises(NotImplementedError, match="second derivatives are not served"):
            jax.grad(lambda query: jax.grad(run)(query).sum())(query)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(run, (query,), (query,))


def test_vmap(small_tiles):
    shapes = [x.shape for x in qkv(t=8)]
    arrays = jax.tree.map(lambda *x: jnp.stack(x), *(draw(*shapes, seed=seed) for seed in (1, 2)))
    run = lambda implementation: jax.vmap(
        jax.value_and_grad(
            lambda *x: attention(*x, mask=mask.causal(), implementation=implementation).sum()
        )
    )(*arrays)
    with pallas_tpu.interpreted():
        found = run("pallas_tpu")
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(run("reference")), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def sharded(arrays, mesh, specs):
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]


@pytest.mark.parametrize("k", quick([4, 2, 1], [2]))
def test_stays_sharded_over_examples_and_heads(k, small_tiles):
    mesh = make_mesh({"data": 2, "model": 4})
    query, heads = P("data", None, "model"), P("data", None, "model" if k == 4 else None)
    arrays = qkv(b=2, t=128, n=8, k=k)
    chosen = mask.causal() & mask.segments(*(jnp.arange(T)[None, :size] // 50 for size in (128, T)))
    loss = lambda implementation: lambda *arrays: (
        attention(
            *arrays, mask=chosen, implementation=implementation,
            dropout_rate=0.2, dropout_key=jax.random.key(0),
        ) ** 2
    ).sum()  # fmt: skip
    gradient = lambda name: jax.value_and_grad(loss(name), (0, 1, 2))
    wanted = gradient("reference")(*arrays)
    with jax.set_mesh(mesh), pallas_tpu.interpreted():
        inputs = sharded(arrays, mesh, (query, heads, heads))
        compiled = jax.jit(gradient("pallas_tpu")).lower(*inputs).compile()
        found = compiled(*inputs)
    collectives = re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    assert not collectives
    assert found[1][0].sharding.is_equivalent_to(NamedSharding(mesh, query), 4)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_mesh_axis_of_unknown_use_is_refused():
    with (
        jax.set_mesh(make_mesh({"context": 8})),
        pallas_tpu.interpreted(),
        pytest.raises(NotImplementedError, match="mesh axis 'context'"),
    ):
        attention(*qkv(), implementation="pallas_tpu")


def test_inside_shard_map_over_some_axes():
    """What is left to the partitioner is divided as ever."""
    mesh = make_mesh({"context": 4, "data": 2})
    arrays = qkv(b=2, t=128, s=64)
    mapped = lambda implementation: jax.jit(jax.shard_map(
        functools.partial(attention, implementation=implementation), mesh=mesh, check_vma=False,
        in_specs=(P(None, "context"), P(), P()), out_specs=P(None, "context"),
        axis_names={"context"},
    ))  # fmt: skip
    with jax.set_mesh(mesh):
        wanted = mapped("reference")(*arrays)
        with pallas_tpu.interpreted():
            found = mapped("pallas_tpu")(*arrays)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_inside_shard_map(small_tiles, monkeypatch):
    """Emulation fails JAX's check of varying axes; kernels for a chip must pass it."""
    mesh = make_mesh({"context": 8})
    arrays = qkv(t=256, s=128)
    chosen = mask.sliding_window(100, 0)

    def loss(query, key, value, implementation):
        out = attention(query, key, value, mask=chosen, implementation=implementation)
        return jax.lax.psum((out**2).sum(), "context")

    def mapped(implementation, check):
        of = functools.partial(loss, implementation=implementation)
        specs = (P(None, "context"), P(), P())
        return jax.jit(jax.shard_map(
            jax.value_and_grad(of, (0,)), mesh=mesh, in_specs=specs,
            out_specs=(P(), (P(None, "context"),)), check_vma=check,
        ))  # fmt: skip

    with pallas_tpu.interpreted():
        found = mapped("pallas_tpu", False)(*arrays)
    wanted = mapped("reference", False)(*arrays)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    monkeypatch.setattr(pallas_tpu, "find_chip", lambda: Chip(5, 2**27, 2**20))
    traced = mapped("pallas_tpu", True).trace(*arrays)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in CASES if "tiled" not in case.name])
def test_shared_cases(name):
    case = BY_NAME[name]
    options = case.options()
    bias = options.pop("bias", None)
    try:
        found, wanted = both(case.arrays(), bias, **options)
    except NotImplementedError as refusal:
        assert str(refusal).startswith("pallas_tpu: ")
        assert case.normalizer != "softmax" or case.bias in ("alibi", "relative", "buckets")
        return
    except ValueError as error:
        assert "has no log-sum-exp" in str(error)
        return
    compare(found, wanted, 1e-3 if case.is_extreme else TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("h", [8, 40, 64, 72, 80, 96, 128, 160, 256])
def test_head_widths(h, dtype, small_tiles):
    arrays = qkv(b=2, t=256, n=4, k=2, h=h, hv=max(8, h // 2), dtype=jnp.dtype(dtype))
    compare(*both(arrays, mask=mask.causal(), softcap=5.0), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles", [Tiles(256, 128, 512), Tiles(128, 256, 256), Tiles(1024, 768, 768)]
)
@pytest.mark.parametrize("name", INTERVALS)
def test_tile_sizes(name, tiles, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "choose_tiles", lambda *_, **__: tiles)
    compare(*both(qkv(n=2, k=2), mask=INTERVALS[name]), TOLERANCE["float32"])
