# SPDX-License-Identifier: Apache-2.0
"""Layouts, balance, traffic and choices of context parallelism: planning, and compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import mask
from attnjax.parallel.context import context_attention, dispatch, layout, plan_context, undispatch
from attnjax.parallel.context.plan import document_lengths
from attnjax.parallel.context.transport import double_ring, needed_keys, ring, selected
from attnjax.train import collectives

LENGTHS = (17, 3, 24)
MADE = {
    "contiguous": lambda t, ranks: layout.contiguous(t, ranks),
    "zigzag": lambda t, ranks: layout.zigzag(t, ranks),
    "document_zigzag": lambda t, ranks: layout.document_zigzag(LENGTHS, ranks),
    "balanced": lambda t, ranks: layout.balanced(mask.causal(), t, ranks, 4),
    "hybrid": lambda t, ranks: layout.hybrid(LENGTHS, ranks, tokens=8),
    "split": lambda t, ranks: layout.zigzag(t, ranks // 2, multiple=2).split(2),
}


def make_mesh(ranks):
    devices = jax.devices()[:ranks]
    return jax.make_mesh((ranks,), ("context",), axis_types=(AxisType.Auto,), devices=devices)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", MADE)
def test_dispatch_is_a_bijection(name, ranks):
    t = sum(LENGTHS)
    made = MADE[name](t, ranks)
    assert (np.diff(made.positions, axis=1) > 0).all()
    flat = made.positions.reshape(-1)
    np.testing.assert_array_equal(np.sort(flat[flat < t]), np.arange(t))
    array = np.arange(2 * t * 3).reshape(2, t, 3) + 1
    expected = np.where((flat < t)[:, None], array[:, np.minimum(flat, t - 1)], 0)
    for mesh in (None, make_mesh(ranks)):
        moved = dispatch(jnp.asarray(array), made, mesh=mesh)
        np.testing.assert_array_equal(moved, expected)
        np.testing.assert_array_equal(undispatch(moved, made, mesh=mesh), array)


def test_zigzag_moves_chunks_by_two_permutations():
    mesh, made = make_mesh(8), layout.zigzag(64, 8)
    place = NamedSharding(mesh, P(None, "context"))
    array = jax.ShapeDtypeStruct((1, 64, 4), jnp.float32, sharding=place)
    text = jax.jit(lambda x: dispatch(x, made, mesh=mesh)).lower(array).compile().as_text()
    found = collectives.total(collectives.read(text))
    assert found.keys() == {"collective-permute"}
    assert found["collective-permute"]["executions"] == 2


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_causal_work_of_layouts(ranks):
    t = 2 * ranks * 128
    causal = mask.causal().visibility(t, t)
    share = lambda made: made.areas(causal).max() / made.areas(causal).mean()
    assert share(layout.zigzag(t, ranks)) == 1.0
    assert share(layout.contiguous(t, ranks)) == pytest.approx(2 - 1 / ranks, rel=0.01)


def pile_lengths(rng, total):
    """Documents with the coarse quantiles of the Pile's lengths."""
    edges = [1, 128, 256, 512, 1024, 2304, 4704, 14208]
    share = np.array([0.229, 0.269, 0.222, 0.128, 0.077, 0.041, 0.030])
    lengths = []
    while sum(lengths) < total:
        i = rng.choice(len(share), p=share / share.sum())
        drawn = int(rng.integers(edges[i], edges[i + 1]))
        lengths.append(min(drawn, total - sum(lengths)))
    return lengths


@pytest.mark.parametrize("seed", range(3))
def test_balanced_layouts_beat_the_zigzag(seed):
    rng = np.random.default_rng(seed)
    ranks, t = 64, 2**19
    lengths = pile_lengths(rng, t)
    masks = {
        "causal_document": mask.documents(lengths, causal=True),
        "share_question": mask.share_question(lengths),
        "prefix": mask.prefix_lm(int(rng.integers(t // 8, t // 2))),
    }
    for name, visible in masks.items():
        visibility = visible.visibility(t, t)
        share = lambda made, v=visibility: made.areas(v).max() / made.areas(v).mean()
        balanced = share(layout.balanced(visible, t, ranks, 512))
        assert balanced < share(layout.zigzag(t, ranks)), name
        if name == "causal_document":
            assert balanced <= 1.05


def test_rings_show_every_block_once():
    for made in (ring(1), ring(5), double_ring(8, 2), double_ring(16, 4), double_ring(6, 2)):
        held = made.held()
        assert held.shape == (made.ranks, made.ranks)
        assert all(len({*column}) == made.ranks for column in held.T)


@pytest.mark.parametrize("name", ["documents", "window", "ids"])
def test_selected_keys_are_those_that_are_seen(name):
    t, ranks = 48, 4
    ids = np.repeat([0, 1, 2], 16)
    visible = {
        "documents": mask.documents((20, 28), causal=True),
        "window": mask.sliding_window(3, 2),
        "ids": mask.segments(ids, ids),
    }[name].visibility(t, t)
    made = layout.zigzag(t, ranks)
    dense = np.broadcast_to(visible.dense(t, t), (1, 1, t, t))[0, 0]
    needed = needed_keys(visible, made)
    for rank, row in enumerate(made.positions):
        np.testing.assert_array_equal(needed[rank], dense[row].any(axis=0))
    chosen = selected(visible, layout.contiguous(t, ranks), stages=2)
    if name == "window":  # Only neighbours see each other.
        assert {distance for rounds in chosen.stages for distance, _ in rounds} == {1, 3}


def test_documents_are_found_in_masks():
    t = sum(LENGTHS)
    for visible, expected in (
        (mask.documents(LENGTHS, causal=True), [*LENGTHS]),
        (mask.documents(LENGTHS, causal=False), [*LENGTHS]),
        (mask.causal(), [t]),
        (mask.share_question(LENGTHS), [t]),
        (mask.block_causal_document(LENGTHS, 4), [*LENGTHS]),
        (mask.sliding_window(0, 0), [1] * t),
    ):
        assert document_lengths(visible.visibility(t, t), t) == expected


@pytest.mark.parametrize(
    ("method", "visible", "options"),
    [
        ("ulysses", mask.causal(), dict(n=32, k=8)),
        ("usp", mask.causal(), dict(n=12, k=4)),
        ("ring", mask.causal(), dict(n=9, k=3)),
        ("balanced", mask.prefix_lm(2000), dict(n=12, k=4)),
        ("all_gather", mask.causal(), dict(n=12, k=4, needs_whole_rows=True)),
    ],
)
def test_choices_say_why(method, visible, options):
    plan = plan_context(visible, 4096, 8, **options)
    assert plan.method == method and len(plan.reason) > 20


def compiled(method, *, ranks=8, t=256, n=8, k=8, h=16, backward=False, **options):
    mesh = make_mesh(ranks)
    place = NamedSharding(mesh, P(None, "context"))
    shape = lambda heads: jax.ShapeDtypeStruct((1, t, heads, h), jnp.float32, sharding=place)
    plan = plan_context(mask.causal(), t, ranks, n=n, k=k, method=method, **options)

    def attend(query, key, value):
        return context_attention(
            query, key, value, mask=mask.causal(), plan=plan, mesh=mesh, dispatched=True
        )

    shapes = (shape(n), shape(k), shape(k))
    lowered = jax.jit(attend).lower(*shapes)
    if backward:  # By itself: within one program the CPU compiler would keep forward's blocks.
        arrays = [jax.device_put(jnp.ones(x.shape), place) for x in shapes]
        out, pull = jax.jit(lambda *a: jax.vjp(attend, *a))(*arrays)
        lowered = jax.jit(lambda pull, out: pull(out)).lower(pull, out)
    return collectives.total(collectives.read(lowered.compile().as_text()))


def test_ulysses_makes_four_exchanges():
    ranks, t, n, h = 8, 256, 8, 16
    found = compiled("ulysses")
    assert found.keys() == {"all-to-all"} and found["all-to-all"]["executions"] == 4
    # 2 (hq + hkv) d t (N - 1) / N^2 elements leave a device; the buffers also hold what stays.
    sent = found["all-to-all"]["bytes"] * (ranks - 1) / ranks
    assert sent == pytest.approx(4 * 2 * (n + n) * h * t * (ranks - 1) / ranks**2, rel=0.01)
    assert compiled("ulysses", backward=True)["all-to-all"]["executions"] == 4


@pytest.mark.parametrize("unrolled", [True, False])
def test_ring_makes_one_permutation_less_than_ranks(unrolled, monkeypatch):
    from attnjax.parallel.context import transport

    if not unrolled:
        monkeypatch.setattr(transport, "UNROLLED", 2)
    ranks, t, k, h = 8, 256, 2, 16
    found = compiled("ring", k=k)
    assert found.keys() == {"collective-permute"}
    assert found["collective-permute"]["executions"] == ranks - 1
    # 2 hkv d t (N - 1) / N elements.
    expected = 4 * 2 * k * h * t * (ranks - 1) / ranks
    assert found["collective-permute"]["bytes"] == pytest.approx(expected, rel=0.01)
    if unrolled:
        # Backward: keys and values again, and their float32 gradients one hop more.
        back = compiled("ring", k=k, backward=True)["collective-permute"]
        assert back["executions"] == (ranks - 1) + ranks
        assert back["bytes"] == pytest.approx(expected * (2 + 1 / (ranks - 1)), rel=0.01)


def test_all_gather_moves_keys_once():
    ranks, t, k, h = 8, 256, 2, 16
    found = compiled("all_gather", k=k)
    assert found.keys() == {"all-gather"}
    sent = found["all-gather"]["bytes"] * (ranks - 1) / ranks
    assert sent == pytest.approx(4 * 2 * k * h * t * (ranks - 1) / ranks, rel=0.01)


def test_usp_makes_exchanges_in_groups_and_a_ring_between_them():
    ranks, ways, t, n, k, h = 8, 4, 256, 8, 4, 16
    found = compiled("usp", n=n, k=k, heads_ways=ways)
    assert found.keys() == {"all-to-all", "collective-permute"}
    around = ranks // ways
    exchanged = found["all-to-all"]["bytes"] * (ways - 1) / ways
    assert exchanged == pytest.approx(4 * 2 * (n + k) * h * t / ranks * (ways - 1) / ways, rel=0.01)
    sent = found["collective-permute"]["bytes"]
    assert sent == pytest.approx(4 * 2 * k / ways * h * t / around * (around - 1), rel=0.01)


def test_balanced_sends_only_what_is_seen():
    t, ranks, k, h = 256, 8, 2, 16
    visible = mask.sliding_window(16, 0)
    mesh = make_mesh(ranks)
    place = NamedSharding(mesh, P(None, "context"))
    shape = lambda heads: jax.ShapeDtypeStruct((1, t, heads, h), jnp.float32, sharding=place)
    plan = plan_context(visible, t, ranks, n=8, k=k, method="balanced", chunk=32)
    attend = jax.jit(
        lambda *a: context_attention(*a, mask=visible, plan=plan, mesh=mesh, dispatched=True)
    )
    text = attend.lower(shape(8), shape(k), shape(k)).compile().as_text()
    found = collectives.total(collectives.read(text))
    units = sum(count for rounds in plan.transport.stages for _, count in rounds)
    assert found["collective-permute"]["bytes"] == 4 * 2 * k * h * units * plan.layout.unit
    # A chunk sees itself and the one before: at most one unit comes from each other rank.
    assert found["collective-permute"]["bytes"] < 4 * 2 * k * h * t * (ranks - 1) / ranks
