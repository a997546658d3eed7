# SPDX-License-Identifier: Apache-2.0
"""Attention over a divided sequence equals attention on one device, gradients and all."""

import dataclasses
import zlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attnjax.ops import attention, mask, normalizers, pallas_tpu
from attnjax.ops.cases import MASKS, Case
from attnjax.ops.statistics import TokenMass
from attnjax.parallel.context import (
    METHODS,
    context_attention,
    dispatch,
    plan_context,
    undispatch,
)

OUT, GRADIENT = 1e-5, 1e-4  # float32: the order of sums across devices differs
BFLOAT16 = 2e-2
WAYS = [method for method in METHODS if method != "auto"]
STATIC = ("hybrid", "balanced")
T = 44  # no rank count divides it
DOCUMENTS = (17, 3, 24)
PLAIN = {
    "full": mask.full(),
    "causal": mask.causal(),
    "documents": mask.documents(DOCUMENTS, causal=True),
    "documents_full": mask.documents(DOCUMENTS, causal=False),
}


def make_mesh(**axes):
    types = (AxisType.Auto,) * len(axes)
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def draw(seed=0, *, b=1, t=T, s=None, n=8, k=2, h=8, hv=6, dtype=jnp.float32):
    return Case("context", b=b, t=t, s=s or t, n=n, k=k, h=h, hv=hv).arrays(seed, dtype)


def both(attend, *arrays, **options):
    """Return an output and the gradients of arrays by a function that sees all of it."""

    def loss(*arrays):
        output = attend(*arrays, return_lse=True, **options)
        out = output.out.astype(jnp.float32)
        return (out * jnp.cos(out)).sum() + jnp.sin(output.lse).sum(), output

    found = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)
    (_, output), gradients = jax.jit(found)(*arrays)
    return output, gradients


def check(arrays, *, method, mesh, out=OUT, gradient=GRADIENT, plan=None, **options):
    expected, wanted = both(attention, *arrays, **options)
    divided = lambda *a, **o: context_attention(*a, method=method, mesh=mesh, plan=plan, **o)
    output, gradients = both(divided, *arrays, **options)
    close(output.out, expected.out, out)
    close(output.lse, expected.lse, out)
    assert output.statistics.keys() == expected.statistics.keys()
    for name, value in expected.statistics.items():
        close(output.statistics[name], value, out)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want, gradient)


def close(got, want, tolerance):
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    np.testing.assert_allclose(got, want, atol=tolerance * max(1, np.abs(want).max()))


@pytest.mark.parametrize("method", WAYS)
def test_eight_ranks_equal_one(method):
    names = ("key_mass", "entropy", "max_probability", "first_token_mass")
    marked = TokenMass(jnp.asarray(np.arange(T)[None] % 3 == 0), "thirds")
    check(
        draw(), method=method, mesh=make_mesh(context=8), mask=PLAIN["documents"],
        statistics=(*names, marked),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("method", WAYS)
def test_all_ranks_and_documents(method, ranks, name, k):
    check(draw(k=k), method=method, mesh=make_mesh(context=ranks), mask=PLAIN[name])


def mask_case(name, seed=None):
    case = Case("context", b=2, t=T, s=T, n=4, k=2, h=4, hv=4)
    return case, MASKS[name](case, np.random.default_rng(seed or zlib.crc32(name.encode())))


@pytest.mark.parametrize(
    ("method", "name"),
    [("ring", "heads"), ("ring", "either"), ("ring", "predicate"), ("usp", "heads"),
     ("usp", "blocks"), ("usp", "dense"), ("usp", "ragged")],
)  # fmt: skip
def test_masks_that_are_no_intervals(method, name):
    case, visible = mask_case(name)
    plan = plan_context(visible, T, 4, n=4, k=2, method=method, heads_ways=2)
    check(case.arrays(1), method=method, mesh=make_mesh(context=4), mask=visible, plan=plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("method", WAYS)
def test_all_masks(method, name):
    case, visible = mask_case(name)
    if method in STATIC and not visible.visibility(T, T).is_static:
        with pytest.raises(ValueError, match="known while tracing"):
            plan_context(visible, T, 4, n=4, method=method)
        return
    check(case.arrays(1), method=method, mesh=make_mesh(context=4), mask=visible)


@pytest.mark.parametrize("method", ["ring", "all_gather", "balanced"])
def test_heads_ways_and_loops_of_longer_rings(method, monkeypatch):
    from attnjax.parallel.context import transport

    monkeypatch.setattr(transport, "UNROLLED", 2)
    check(
        draw(2), method=method, mesh=make_mesh(context=8), mask=PLAIN["causal"],
        statistics=("key_mass", "entropy"),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["usp", "double_ring"])
def test_two_dimensions(method):
    visible = PLAIN["documents"]
    ways = 2 if method == "usp" else 1
    plan = plan_context(visible, T, 8, n=8, k=2, method=method, heads_ways=ways)
    assert plan.heads_ways == ways and plan.transport.ranks == 8 // ways
    if method == "double_ring":
        assert len({*plan.transport.hops}) == 2
    check(
        draw(3), method=method, mesh=make_mesh(context=8), mask=visible, plan=plan,
        statistics=("key_mass", "max_probability"),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["ring", "ulysses", "balanced"])
def test_softmax_relatives_soft_caps_and_biases(method):
    rng = np.random.default_rng(0)
    sink = jnp.asarray(rng.standard_normal(8), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((8, T, T)), jnp.float32)
    mesh = make_mesh(context=4)
    options = dict(mask=PLAIN["causal"], softcap=3.0, statistics=("key_mass", "entropy"))

    def with_extras(attend):
        return lambda q, k, v, sink, bias, **o: attend(
            q, k, v, normalizer=normalizers.SinkLogit(sink), bias=bias, **o
        )

    divided = lambda *a, **o: context_attention(*a, method=method, mesh=mesh, **o)
    arrays = (*draw(4), sink, bias)
    expected, wanted = both(with_extras(attention), *arrays, **options)
    output, gradients = both(with_extras(divided), *arrays, **options)
    for got, want in (
        (output.out, expected.out), (output.lse, expected.lse),
        *((output.statistics[name], x) for name, x in expected.statistics.items()),
    ):  # fmt: skip
        close(got, want, OUT)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want, GRADIENT)


def few(*methods):
    """Let the other methods be for the slow tests."""
    return [m if m in methods else pytest.param(m, marks=pytest.mark.slow) for m in WAYS]


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", few("ring", "ulysses", "balanced"))
def test_dropout_does_not_depend_on_ranks(method, ranks):
    arrays, key = draw(5, b=2), jax.random.key(1)
    options = dict(mask=PLAIN["causal"], dropout_rate=0.3, dropout_key=key)
    expected = attention(*arrays, implementation="reference", **options)
    divided = context_attention(*arrays, method=method, mesh=make_mesh(context=ranks), **options)
    close(divided, expected, OUT)


def test_dropout_has_the_same_gradient():
    check(
        draw(5, b=2), method="ring", mesh=make_mesh(context=4), mask=PLAIN["causal"],
        dropout_rate=0.3, dropout_key=jax.random.key(1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "normalizer"),
    [
        ("all_gather", normalizers.Elastic(jnp.linspace(0.1, 0.4, 8))),
        ("ulysses", normalizers.Sigmoid()),
        ("auto", normalizers.Sigmoid()),
    ],
)
def test_normalizers_without_log_sum_exp_get_whole_rows(method, normalizer):
    arrays, mesh = draw(6), make_mesh(context=4)

    def run(attend):
        def loss(arrays, normalizer):
            output = attend(
                *arrays, mask=PLAIN["causal"], normalizer=normalizer, statistics=("key_mass",)
            )
            return jnp.sin(output.out).sum(), output

        found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(found)(arrays, normalizer)

    (_, expected), wanted = run(attention)
    divided = lambda *a, **o: context_attention(*a, method=method, mesh=mesh, **o)
    (_, output), gradients = run(divided)
    close(output.out, expected.out, OUT)
    close(output.statistics["key_mass"], expected.statistics["key_mass"], OUT)
    jax.tree.map(lambda got, want: close(got, want, GRADIENT), gradients, wanted)


@pytest.mark.parametrize("method", few("ring"))
def test_half_precision_is_merged_in_float32(method):
    arrays = draw(7, dtype=jnp.bfloat16)
    check(
        arrays, method=method, mesh=make_mesh(context=8), mask=PLAIN["causal"], out=BFLOAT16,
        gradient=BFLOAT16,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
def test_implementations(implementation):
    with pallas_tpu.interpreted():
        check(
            draw(8, t=32, n=2, k=1), method="ring", mesh=make_mesh(context=2),
            mask=PLAIN["causal"], implementation=implementation,
        )  # fmt: skip


def test_more_keys_than_queries():
    check(draw(9, t=10, s=37), method="ring", mesh=make_mesh(context=4), mask=mask.causal())
    check(draw(9, t=10, s=37), method="all_gather", mesh=make_mesh(context=4), mask=mask.causal())


def test_sequences_shorter_than_ranks():
    check(draw(10, t=3), method="ring", mesh=make_mesh(context=8), mask=mask.causal())


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_other_axes_of_an_ambient_mesh_stay_divided(method):
    arrays = draw(11, b=2, t=32)
    expected, wanted = both(attention, *arrays, mask=PLAIN["causal"])
    with jax.set_mesh(make_mesh(data=2, model=2, context=2)):
        place = jax.sharding.PartitionSpec("data", "context", "model")
        placed = tuple(jax.device_put(x, place) for x in arrays)
        divided = lambda *a, **o: context_attention(*a, method=method, **o)
        output, gradients = both(divided, *placed, mask=PLAIN["causal"])
    close(output.out, expected.out, OUT)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want, GRADIENT)


@pytest.mark.parametrize("method", few("ring", "hybrid"))
def test_dispatched_sequences_stay_dispatched(method):
    mesh, visible = make_mesh(context=4), PLAIN["documents"]
    query, key, value = draw(12)
    plan = plan_context(visible, T, 4, n=8, k=2, method=method)
    to = lambda x: dispatch(x, plan.layout, mesh=mesh)
    positions = plan.layout.positions.reshape(-1)
    np.testing.assert_array_equal(
        dispatch(jnp.arange(T)[None], plan.layout)[0], np.where(positions < T, positions, 0)
    )
    out = context_attention(
        *(to(x) for x in (query, key, value)), mask=visible, mesh=mesh, plan=plan, dispatched=True
    )
    assert out.shape[1] == 4 * plan.layout.size
    close(undispatch(out, plan.layout, mesh=mesh), attention(query, key, value, mask=visible), OUT)


def test_one_rank_is_the_core():
    arrays = draw(13)
    expected = attention(*arrays, mask=mask.causal())
    np.testing.assert_array_equal(context_attention(*arrays, mask=mask.causal()), expected)


@st.composite
def calls(draw_value):
    t = draw_value(st.integers(1, 30))
    k = draw_value(st.sampled_from([1, 2]))
    n = k * draw_value(st.sampled_from([1, 2, 4]))
    ranks = draw_value(st.sampled_from([2, 4, 8]))
    cuts = sorted(draw_value(st.sets(st.integers(1, max(1, t - 1)), max_size=3)) - {t})
    lengths = [int(x) for x in np.diff([0, *cuts, t])] if t > 1 else [1]
    kind = draw_value(st.integers(0, 5))
    visible = [
        lambda: mask.documents(lengths, causal=draw_value(st.booleans())),
        lambda: mask.prefix_lm(draw_value(st.integers(0, t))),
        lambda: mask.sliding_window(draw_value(st.integers(0, t)), draw_value(st.integers(0, 3))),
        lambda: mask.share_question(lengths),
        lambda: mask.global_sliding_window(draw_value(st.integers(0, t)), 1),
        lambda: mask.causal_blockwise(lengths),
    ][kind]()
    method = draw_value(st.sampled_from([m for m in METHODS if m != "ulysses" or n % ranks == 0]))
    return Case("drawn", b=1, t=t, s=t, n=n, k=k, h=4, hv=4), visible, method, ranks


def run_drawn(call):
    case, visible, method, ranks = call
    check(case.arrays(3), method=method, mesh=make_mesh(context=ranks), mask=visible)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True, database=None)
@hypothesis.given(calls())
def test_drawn_masks_lengths_heads_and_methods(call):
    run_drawn(call)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.given(calls())
def test_many_drawn_masks_lengths_heads_and_methods(call):
    run_drawn(call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="rings"), "method 'rings' is unknown; choose from"),
        (dict(method="ulysses", n=6, k=6), "shares 6 heads over 4 ranks"),
        (dict(method="usp", heads_ways=3), "heads_ways=3 must divide the 4 ranks"),
        (dict(method="balanced", s=50), "as many queries as keys"),
        (dict(method="ring", needs_whole_rows=True), "choose 'all_gather' or 'ulysses'"),
    ],
)
def test_plans_that_cannot_be(change, message):
    options = dict(n=8, k=2) | change
    with pytest.raises(ValueError, match=message):
        plan_context(None, T, 4, **options)


def test_calls_that_cannot_be():
    arrays, mesh = draw(14), make_mesh(context=4)
    plan = plan_context(None, T, 8, n=8)
    with pytest.raises(ValueError, match="the plan is for 8 ranks, mesh axis 'context' has 4"):
        context_attention(*arrays, mesh=mesh, plan=plan)
    with pytest.raises(ValueError, match="need the plan"):
        context_attention(*arrays, mesh=mesh, dispatched=True)
    shorter = plan_context(None, T - 1, 4, n=8)
    with pytest.raises(ValueError, match="for lengths"):
        context_attention(*arrays, mesh=mesh, plan=shorter)
    with pytest.raises(NotImplementedError, match="return_probabilities"):
        context_attention(*arrays, mesh=mesh, return_probabilities=True)
    traced = mask.segments(jnp.zeros(T, jnp.int32), jnp.zeros(T, jnp.int32))
    with pytest.raises(ValueError, match="known while tracing"):
        jax.jit(lambda ids: context_attention(
            *arrays, mesh=mesh, method="balanced", mask=mask.segments(ids, ids)
        ))(traced.query_ids)  # fmt: skip
    with pytest.raises(ValueError, match="choose 'all_gather'"):
        context_attention(
            *arrays, mesh=mesh, method="ulysses", normalizer=normalizers.Elastic(jnp.ones(8))
        )


def test_segment_ids_known_at_run_time():
    ids = jnp.asarray(np.repeat([0, 1, 2], [20, 4, 20]))
    arrays, mesh = draw(15), make_mesh(context=4)

    @jax.jit
    def run(ids):
        visible = mask.causal() & mask.segments(ids, ids)
        return context_attention(*arrays, mesh=mesh, method="ring", mask=visible)

    for at in (ids, ids[::-1] * 0 + jnp.arange(T) // 11):
        visible = mask.causal() & mask.segments(at, at)
        close(run(at), attention(*arrays, mask=visible), OUT)
    assert run._cache_size() == 1


def test_plans_are_found_by_value():
    # Two plans of the same sizes share one compiled program.
    one, two = (plan_context(mask.causal(), 64, 4, n=8, method="balanced") for _ in range(2))
    assert one.layout == two.layout and hash(one.transport) == hash(two.transport)
    assert dataclasses.replace(one, layout=two.key_layout).layout == two.layout
