# SPDX-License-Identifier: Apache-2.0
"""Chunked attention equals the materialised one: values, gradients, statistics, skipped tiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import NORMALIZERS, TokenMass, attention, chunked, mask
from attnjax.ops.bias import Bias
from attnjax.ops.cases import draw_normalizer
from attnjax.ops.chunked import Tiles
from attnjax.ops.normalizer import Elementwise

# Float32 sums of a few dozen terms in another order; bfloat16 has eight bits.
TOLERANCE = 2e-5
TOLERANCE_BFLOAT16 = 2e-2
LENGTH = 52


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(chunked, "choose_tiles", lambda *_, **__: Tiles(1, 16, 24))


@pytest.fixture
def small_groups(monkeypatch):
    """Tiles of one head each."""
    monkeypatch.setattr(chunked, "choose_tiles", lambda *_, **__: Tiles(1, 16, 24, 1))


def arrays(dtype="float32", b=2, t=LENGTH, s=LENGTH, n=4, k=2, h=16, hv=8):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return make(b, t, n, h), make(b, s, k, h), make(b, s, k, hv)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slope(Bias):
    """-|query - key| * slope, for the test."""

    slope: jax.Array

    def check(self, b, n, t, s):
        assert self.slope.shape == (n,)

    def tile(self, query_start, key_start, rows, columns, t, s):
        query = query_start + jnp.arange(rows)[:, None] + s - t
        key = key_start + jnp.arange(columns)[None]
        return -jnp.abs(query - key) * self.slope[None, :, None, None]


RNG = np.random.default_rng(1)
IDS = RNG.integers(0, 3, (2, LENGTH))
DEAD = RNG.random((2, 4, LENGTH, LENGTH)) < 0.4
DEAD[:, :, 16:32] = False
MASKS = {
    "none": None,
    "causal": mask.causal(),
    "window": mask.sliding_window(9, 3),
    "documents": mask.documents([20, 1, 31], causal=True),
    "global": mask.global_sliding_window(5, 3),
    "segments": mask.causal() & mask.segments(IDS, IDS),
    "ragged": mask.padding(np.array([LENGTH, 7]), np.array([30, 0])),
    "dead tile": mask.array(DEAD),
    "nothing": mask.array(np.zeros((1, 1), bool)),
    "heads": mask.per_head(
        [mask.causal(), mask.full(), mask.sliding_window(3, 3), mask.prefix_lm(9)]
    ),
    "blocks": mask.blocks(RNG.random((4, 4, 2)) < 0.5, 13, 26),
    "predicate": mask.predicate(lambda q, k: (q - k) % 3 == 0) | mask.causal(),
}


MASSES = ("key_mass", "first_token_mass", TokenMass(np.arange(LENGTH)[None] % 5 == 0, "fifths"))
STATISTICS = (*MASSES, "entropy", "max_probability")


def compare(options, inputs, tolerance):
    """Outputs and gradients of both implementations, through out and lse."""

    def run(implementation):
        def loss(arguments):
            out = attention(**arguments, **options, implementation=implementation, return_lse=True)
            weight = jnp.cos(jnp.arange(out.out.size, dtype=jnp.float32)).reshape(out.out.shape)
            seen = jnp.where(out.lse > -1e29, out.lse, 0)
            return (out.out.astype(jnp.float32) * weight).sum() + (seen**2).mean(), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)

    expected, found = run("reference"), run("chunked")
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        scale = max(1.0, np.abs(a[np.abs(a) < 1e29]).max(initial=0))
        np.testing.assert_allclose(b / scale, a / scale, rtol=0, atol=tolerance)
        assert np.isfinite(b).all()


@pytest.mark.parametrize("name", MASKS)
def test_masks(small_tiles, name):
    inputs = dict(zip(("query", "key", "value"), arrays(), strict=True))
    compare({"mask": MASKS[name]}, inputs, TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 1, 4, 1), (2, 4, LENGTH, LENGTH), (1, 4, 1, LENGTH)])
def test_bias_softcap_and_dropout(small_tiles, shape):
    inputs = dict(zip(("query", "key", "value"), arrays(), strict=True))
    shape = tuple(LENGTH if size == 4 and axis == 2 else size for axis, size in enumerate(shape))
    inputs["bias"] = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    options = dict(softcap=3.0, dropout_rate=0.3, dropout_key=jax.random.key(5))
    compare({"mask": mask.causal(), **options}, inputs, TOLERANCE)


def test_bias_object_gets_its_gradient(small_tiles):
    inputs = dict(zip(("query", "key", "value"), arrays(), strict=True))
    inputs["bias"] = Slope(jnp.asarray([0.5, 0.1, 0.0, 0.3]))
    compare({"mask": mask.causal()}, inputs, TOLERANCE)


@pytest.mark.parametrize("name", ["segments", "dead tile", "heads", "blocks", "predicate"])
def test_groups_of_heads(small_groups, name):
    inputs = dict(zip(("query", "key", "value"), arrays(), strict=True))
    bias = np.random.default_rng(2).standard_normal((1, 4, LENGTH, LENGTH))
    inputs["bias"] = jnp.asarray(bias, jnp.float32)
    options = dict(softcap=3.0, dropout_rate=0.3, dropout_key=jax.random.key(5))
    compare({"mask": MASKS[name], **options}, inputs, TOLERANCE)


def test_groups_of_heads_with_a_bias_object(small_groups):
    inputs = dict(zip(("query", "key", "value"), arrays(), strict=True))
    inputs["bias"] = Slope(jnp.asarray([0.5, 0.1, 0.0, 0.3]))
    compare({"mask": mask.causal()}, inputs, TOLERANCE)


ELEMENTWISE = [name for name, made in NORMALIZERS.items() if issubclass(made, Elementwise)]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_normalizers_over_tiles(small_groups, name):
    """Output, every gradient, and the statistics of what they call probabilities."""
    query, key, value = arrays()
    normalizer = draw_normalizer(name, np.random.default_rng(3), 4, 16, 8)
    statistics = MASSES if normalizer.is_signed else STATISTICS
    options = dict(mask=MASKS["dead tile"], softcap=2.0, statistics=statistics)

    def run(implementation):
        def loss(query, key, value, normalizer):
            found = attention(
                query, key, value, normalizer=normalizer, implementation=implementation, **options
            )
            weight = jnp.cos(jnp.arange(found.out.size, dtype=jnp.float32))
            return (found.out.ravel() * weight).sum(), (found.out, found.statistics)

        step = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        return jax.jit(step)(query, key, value, normalizer)

    expected, found = run("reference"), run("chunked")
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        size = max(1.0, np.abs(a).max(initial=0))
        np.testing.assert_allclose(b / size, a / size, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("t", "s"), [(1, 40), (40, 1), (1, 1), (33, 70)])
def test_lengths(small_tiles, t, s):
    inputs = dict(zip(("query", "key", "value"), arrays(t=t, s=s), strict=True))
    compare({"mask": mask.causal()}, inputs, TOLERANCE)


def test_bfloat16(small_tiles):
    inputs = dict(zip(("query", "key", "value"), arrays("bfloat16"), strict=True))
    compare({"mask": mask.causal()}, inputs, TOLERANCE_BFLOAT16)


@pytest.mark.parametrize("size", [1e2, -1e2])
def test_large_scores(small_tiles, size):
    query, key, value = arrays()
    inputs = {"query": size * query, "key": 10 * key, "value": value}
    out = attention(**inputs, mask=mask.causal(), implementation="chunked")
    expected = attention(**inputs, mask=mask.causal(), implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("heads", [None, 1])
@pytest.mark.parametrize("name", ["none", "documents", "dead tile", "ragged"])
def test_statistics_equal_explicit_probabilities(monkeypatch, name, heads):
    monkeypatch.setattr(chunked, "choose_tiles", lambda *_, **__: Tiles(1, 16, 24, heads))
    query, key, value = arrays()
    options = dict(mask=MASKS[name], statistics=STATISTICS, softcap=4.0)
    expected, found = (
        attention(query, key, value, **options, implementation=i).statistics
        for i in ("reference", "chunked")
    )
    assert set(found) == {"key_mass", "entropy", "max_probability", "first_token_mass", "fifths"}
    for key_, value_ in expected.items():
        np.testing.assert_allclose(found[key_], value_, atol=1e-5, err_msg=key_)


@pytest.mark.slow
def test_statistics_at_full_context_length():
    """65,536 tokens: 17 GB of weights in float32, of which nothing is held.

    Rows are checked against the definition, and what all keys receive against what all rows give.
    """
    t = 2**16
    query, key, value = arrays(b=1, t=t, s=t, n=1, k=1)
    tokens = np.arange(t)[None] % 5 == 0
    statistics = [TokenMass(tokens, "fifths") if x is MASSES[2] else x for x in STATISTICS]
    run = jax.jit(
        lambda *x: (
            attention(
                *x, mask=mask.causal(), statistics=statistics, implementation="chunked"
            ).statistics
        )
    )
    memory = run.lower(query, key, value).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**28
    found = run(query, key, value)
    rows = np.array([0, 1, 511, 512, 40_000, t - 1])
    scores = np.asarray(query[0, rows, 0], np.float64) @ np.asarray(key[0, :, 0], np.float64).T / 4
    weights = np.exp(scores) * (np.arange(t) <= rows[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    wanted = {
        "entropy": -(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=1),
        "max_probability": weights.max(axis=1),
        "first_token_mass": weights[:, 0],
        "fifths": weights @ tokens[0],
    }
    for name, value_ in wanted.items():
        np.testing.assert_allclose(found[name][0, 0, rows], value_, rtol=1e-5, err_msg=name)
    given, received = (np.asarray(x, np.float64) for x in (found["fifths"], found["key_mass"]))
    np.testing.assert_allclose(received.sum(), t, rtol=1e-5)
    np.testing.assert_allclose((received * tokens).sum(), given.sum(), rtol=1e-5)


def visited(made, t=256, tile=32):
    """Count the tiles that the loops really run over."""
    plan = chunked.Plan(Tiles(1, tile, tile), (1, 1, t, t), 1, 1.0, None, 0.0)
    tiled = plan.prepare_mask(made.visibility(t, t))
    return int(tiled.full_count.sum() + tiled.partial_count.sum())


def test_only_visible_tiles_are_visited():
    assert visited(mask.causal()) == 8 * 9 // 2
    assert visited(mask.sliding_window(31, 0)) == 8 + 7
    # Linear in the length for a window.
    assert visited(mask.sliding_window(31, 0), t=512) == 16 + 15
    assert visited(mask.documents([32] * 8, causal=True)) == 8
    kept = np.random.default_rng(0).random((8, 8)) < 0.3
    assert visited(mask.blocks(kept, 32, 32)) == kept.sum()


def test_other_boundaries_do_not_compile_again(small_tiles):
    query, key, value = arrays()
    run = lambda lengths: attention(
        query, key, value, mask=mask.documents(lengths, causal=True), implementation="chunked"
    )
    run([20, 32])
    before = chunked._attend_jit._cache_size()
    out = run([13, 3, 36])
    assert chunked._attend_jit._cache_size() == before
    expected = attention(
        query, key, value, mask=mask.documents([13, 3, 36], causal=True),
        implementation="reference",
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)


@pytest.mark.parametrize("devices", [2, 8])
def test_sharded_batch_and_heads(devices):
    query, key, value = arrays(b=8, n=8, k=8)
    options = dict(mask=mask.causal(), dropout_rate=0.2, dropout_key=jax.random.key(1))
    expected = attention(query, key, value, **options, implementation="reference")
    sizes = {2: (2, 1), 8: (4, 2)}[devices]
    mesh = jax.make_mesh(
        sizes, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )  # fmt: skip
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.P("data", None, "model"))
        run = jax.jit(
            lambda *a: attention(*a, **options, implementation="chunked"), out_shardings=place
        )
        placed = [jax.device_put(x, place) for x in (query, key, value)]
        np.testing.assert_allclose(run(*placed), expected, atol=TOLERANCE)
        text = run.lower(*placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_memory_is_linear_in_the_length():
    def temporaries(t):
        shapes = [jax.ShapeDtypeStruct((1, t, 2, 64), jnp.float32)] * 3

        def both(q, k, v):
            loss = lambda *a: attention(*a, mask=mask.causal(), implementation="chunked").sum()
            return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

        return jax.jit(both).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) <= 2.2 * temporaries(8192)


def test_transformations(small_tiles):
    query, key, value = arrays()
    run = lambda q: attention(q, key, value, mask=mask.causal(), implementation="chunked")
    expected = run(query)
    mapped = jax.vmap(run)(jnp.stack([query, 2 * query]))
    np.testing.assert_allclose(mapped[0], expected, atol=TOLERANCE)
    scanned = jax.lax.scan(lambda c, q: (c, run(q)), None, jnp.stack([query, query]))[1]
    np.testing.assert_allclose(scanned[1], expected, atol=TOLERANCE)
    remat = jax.grad(lambda q: jax.checkpoint(run)(q).sum())(query)
    np.testing.assert_allclose(remat, jax.grad(lambda q: run(q).sum())(query), atol=TOLERANCE)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(run, (query,), (query,))


def test_refusals():
    query, key, value = arrays()
    for options, message in (
        ({"return_probabilities": True}, "return_probabilities"),
        ({"return_scores": [0]}, "return_scores"),
        ({"edit": lambda p: p}, "edit"),
    ):
        with pytest.raises(NotImplementedError, match=f"chunked: {message}"):
            attention(query, key, value, implementation="chunked", **options)
