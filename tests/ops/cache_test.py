# SPDX-License-Identifier: Apache-2.0
"""Caches against attention that has everything at once, and against a loop that has each query."""

import contextlib
import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, cache, mask
from attnjax.ops.bias import Bias
from attnjax.ops.cache import (
    FullCache,
    PagedCache,
    Quantisation,
    SinkWindowCache,
    WindowCache,
    append_and_attend,
    attend_cached,
)
from attnjax.ops.normalizers import KeyBias
from attnjax.ops.positions import rotate

B, N, K, H, HV = 3, 4, 2, 8, 6
CHUNK = 5
LENGTHS = (37, 0, 23)
"""Tokens of each example; the second never gets any."""

F32 = 2e-5  # Contract of the core for float32.
BF16 = 2e-2  # And for bfloat16, relative to values of order one.

SIZES = dict(batch=B, heads=K, width=H, value_width=HV)
rope = functools.partial(rotate, base=100.0)


def tokens(length, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, HV)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@jax.jit
def parallel(query, key, value, pattern):
    """What a cache must give: attention that has the whole stream at once."""
    return attention(query, key, value, mask=pattern)


turn = jax.jit(lambda x: rope(x, jnp.arange(x.shape[1])[None]))


def plan(lengths, chunk, seed=0):
    """Cut streams into ragged chunks: a list of lengths `[b]`, each in [0, chunk]."""
    rng, left, chunks = np.random.default_rng(seed), np.array(lengths), []
    while left.any():
        chunks.append(np.minimum(rng.integers(0, chunk + 1, len(left)), left))
        left = left - chunks[-1]
    return chunks


def feed(step, state, streams, chunks, chunk):
    """Give streams to `step(state, query, key, value, lengths)` chunk by chunk.

    Places beyond the lengths hold NaN in keys and values. Returns rows that belong to tokens
    `[b,T,n,hv]`, zero elsewhere, and the final state.
    """
    streams = [np.asarray(x).astype(np.float32) for x in streams]
    done, rows = np.zeros(B, int), np.zeros((B, streams[0].shape[1], N, HV), np.float32)
    for lengths in chunks:
        parts = []
        for x, filler in zip(streams, (7.0, np.nan, np.nan), strict=True):
            part = np.full((B, chunk, *x.shape[2:]), filler, np.float32)
            for i, size in enumerate(lengths):
                part[i, :size] = x[i, done[i] : done[i] + size]
            parts.append(part)
        out, state = step(state, *parts, lengths.astype(np.int32))
        for i, size in enumerate(lengths):
            rows[i, done[i] : done[i] + size] = out[i, :size]
            np.testing.assert_array_equal(out[i, size:], 0)
        done += lengths
    return rows, state


@functools.cache
def stepper(dtype=jnp.float32, rotate=None):
    """A compiled step that takes float32 arrays and works in the dtype."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, query, key, value, lengths):
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        out, state = append_and_attend(query, key, value, state, lengths=lengths, rotate=rotate)
        return out.astype(jnp.float32), state

    return step


def paged(**sizes):
    return PagedCache.empty(**sizes, pages=24, page_size=4, max_pages_per_sequence=10)


def shown(window=None, sinks=0):
    """Mask of a whole stream: causal, or the first `sinks` and the last `window`."""
    if window is None:
        return mask.causal()
    return mask.sliding_window(window - 1, 0) | (mask.causal() & between((0, sinks)))


def between(*intervals):
    """Keys in some intervals [lower, upper)."""
    lower, upper = np.array(intervals, np.int32).T[:, None, None, :, None]
    return mask.ranges(lower, upper)


CACHES = {
    "full": (functools.partial(FullCache.empty, capacity=40), shown()),
    "paged": (paged, shown()),
    "window": (functools.partial(WindowCache.empty, window=6, chunk=3), shown(6)),
    "window of one": (functools.partial(WindowCache.empty, window=1), shown(1)),
    "window for whole chunks": (
        functools.partial(WindowCache.empty, window=4, chunk=CHUNK), shown(4),
    ),
    "sinks": (
        functools.partial(SinkWindowCache.empty, sinks=3, window=5, positions="absolute"),
        shown(5, 3),
    ),
    "fewer in the window than sinks": (
        functools.partial(SinkWindowCache.empty, sinks=5, window=2, positions="absolute"),
        shown(2, 5),
    ),
    "sinks for chunks": (
        functools.partial(SinkWindowCache.empty, sinks=4, window=7, chunk=4, positions="absolute"),
        shown(7, 4),
    ),
}  # fmt: skip


def assert_rows(found, expected, lengths, tolerance):
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(
            found[i, :length],
            np.asarray(expected[i, :length], np.float32),
            atol=tolerance,
            rtol=tolerance,
        )


@pytest.mark.parametrize(
    ("name", "is_rotated_at_use"),
    [
        ("full", False), ("full", True), ("paged", True), ("window", True),
        ("window of one", False), ("window for whole chunks", False), ("sinks", False),
        ("sinks for chunks", True), ("fewer in the window than sinks", True),
    ],
)  # fmt: skip
def test_chunks_equal_the_parallel_form(name, is_rotated_at_use):
    make, pattern = CACHES[name]
    query, key, value = tokens(max(LENGTHS))
    turned = turn(query), turn(key)
    expected = parallel(*turned, value, pattern)
    if is_rotated_at_use:
        streams, rotate = (query, key, value), rope
    else:
        streams, rotate = (*turned, value), None
    step = stepper(rotate=rotate)
    found, state = feed(step, make(**SIZES), streams, plan(LENGTHS, CHUNK), CHUNK)
    assert_rows(found, expected, LENGTHS, F32)
    np.testing.assert_array_equal(state.length, LENGTHS)
    assert not state.overflowed().any()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ["full", "sinks for chunks", *(pytest.param(x, marks=SLOW) for x in ("paged", "window"))],
)
def test_bfloat16(name):
    make, pattern = CACHES[name]
    query, key, value = tokens(max(LENGTHS), jnp.bfloat16)
    expected = parallel(*(x.astype(jnp.float32) for x in (query, key, value)), pattern)
    state = make(**SIZES, dtype=jnp.bfloat16)
    step = stepper(jnp.bfloat16)
    found, state = feed(step, state, (query, key, value), plan(LENGTHS, CHUNK), CHUNK)
    assert state.key.dtype == state.value.dtype == jnp.bfloat16
    assert_rows(found, expected, LENGTHS, BF16)


def test_storage_has_a_dtype_of_its_own():
    query, key, value = tokens(CHUNK)
    expected = parallel(query, key, value, mask.causal())
    state = FullCache.empty(**SIZES, capacity=20, dtype=(jnp.bfloat16, jnp.float32))
    out, state = stepper()(state, query, key, value, np.full(B, CHUNK))
    assert (state.key.dtype, state.value.dtype) == (jnp.bfloat16, jnp.float32)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=BF16, rtol=BF16)


def exact_rope(x_tnh, positions):
    """As `rope`, in float64 by complex numbers."""
    half = H // 2
    angle = positions[:, None, None] * 100.0 ** (-np.arange(half) / half)
    turned = (x_tnh[..., :half] + 1j * x_tnh[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def streaming_oracle(query, key, value, sinks, window):
    """StreamingLLM one query at a time in float64: only kept keys, at their places."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((query.shape[0], N, HV))
    for p in range(query.shape[0]):
        kept = [j for j in range(p + 1) if j < sinks or j > p - window]
        turned_key = exact_rope(key[kept], np.arange(len(kept)))
        turned_query = exact_rope(query[p : p + 1], np.array([len(kept) - 1]))[0]
        for n in range(N):
            k = n // (N // K)
            scores = turned_key[:, k] @ turned_query[n] * H**-0.5
            weights = np.exp(scores - scores.max())
            out[p, n] = weights / weights.sum() @ value[kept, k]
    return out


@pytest.mark.parametrize("chunk", [1, 4, CHUNK])
def test_places_in_the_cache_are_positions(chunk):
    sinks, window = 3, 6
    streams = tokens(max(LENGTHS))
    state = SinkWindowCache.empty(**SIZES, sinks=sinks, window=window, chunk=chunk)
    found, _ = feed(stepper(rotate=rope), state, streams, plan(LENGTHS, CHUNK), CHUNK)
    for i, length in enumerate(LENGTHS):
        expected = streaming_oracle(*(x[i, :length] for x in streams), sinks, window)
        np.testing.assert_allclose(found[i, :length], expected, atol=F32, rtol=F32)


def test_positions_of_a_streaming_cache():
    state = SinkWindowCache.empty(batch=1, heads=1, width=2, sinks=2, window=3)
    one = jnp.ones((1, 1, 1, 2))
    seen = {}
    for token in range(9):
        state = state.append(one, one)
        seen[token] = state.key_positions()[0].tolist(), int(state.query_positions(1)[0, 0])
    # Slots: two sinks, then a ring of three in which token 5 replaces token 2.
    assert seen[4] == ([0, 1, 2, 3, 4], 4)
    assert seen[5] == ([0, 1, 4, 2, 3], 4)
    assert seen[8] == ([0, 1, 4, 2, 3], 4)
    absolute = dataclasses.replace(state, positions="absolute")
    assert absolute.key_positions()[0].tolist() == [0, 1, 8, 6, 7]
    assert absolute.query_positions(1).tolist() == [[8]]


def test_streaming_cache_that_is_large_enough_is_full_attention():
    length = max(LENGTHS)
    streams = tokens(length)
    chunks = plan((length,) * B, CHUNK)
    full, streaming = (
        feed(stepper(rotate=rope), state, streams, chunks, CHUNK)[0]
        for state in (
            FullCache.empty(**SIZES, capacity=40),
            SinkWindowCache.empty(**SIZES, sinks=4, window=length - 4, chunk=CHUNK),
        )
    )
    np.testing.assert_allclose(streaming, full, atol=1e-6)


def test_a_ring_wraps_many_times_in_constant_memory():
    state = SinkWindowCache.empty(**SIZES, sinks=2, window=5)
    size = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    before, length = size(state), 151
    streams = tokens(length)
    expected = parallel(*streams, shown(5, 2))
    step = stepper()
    for token in range(length):
        parts = [x[:, token : token + 1] for x in streams]
        out, state = step(state, *parts, jnp.ones(B, jnp.int32))
        if token % 30 == 0:
            np.testing.assert_allclose(out[:, 0], expected[:, token], atol=F32, rtol=F32)
    assert size(state) == before


def test_a_chunk_far_longer_than_the_ring():
    streams = tokens(max(LENGTHS))
    state = WindowCache.empty(**SIZES, window=4, chunk=3)
    out, state = stepper()(state, *streams, np.array(LENGTHS))
    assert_rows(out, parallel(*streams, shown(4)), LENGTHS, F32)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(state.fresh, LENGTHS)
    # Appending alone keeps the end of the chunk.
    alone = WindowCache.empty(**SIZES, window=4, chunk=3).append(*streams[1:])
    held = np.asarray(alone.key_positions())[0]
    assert sorted(held) == list(range(31, 37))
    np.testing.assert_array_equal(alone.key[0], streams[1][0, held])


def test_fewer_queries_than_tokens_are_the_last():
    query, key, value = tokens(9)
    lengths = jnp.array([9, 4, 0])
    state = FullCache.empty(**SIZES, capacity=12).append(key, value, lengths)
    last = jnp.stack([query[0, 8:9], query[1, 3:4], query[2, :1]])
    out = jax.jit(attend_cached)(last, state)
    expected = parallel(query, key, value, mask.causal())
    np.testing.assert_allclose(out[0, 0], expected[0, 8], atol=F32)
    np.testing.assert_allclose(out[1, 0], expected[1, 3], atol=F32)
    np.testing.assert_array_equal(out[2], 0)


@contextlib.contextmanager
def compilations():
    """Collect the names of programs that XLA compiles."""
    found = []
    listen = lambda event, duration, **_: (
        found.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", ["full", "paged", "window", "sinks for chunks"])
def test_all_steps_share_one_compilation(name):
    make, _ = CACHES[name]
    state, step = make(**SIZES), stepper.__wrapped__(rotate=rope)
    query, key, value = (np.asarray(x) for x in tokens(CHUNK))
    with compilations() as found:
        for lengths in ([5, 0, 2], [1, 0, 5], [0, 0, 0], [3, 4, 5], [5, 5, 5], [2, 1, 0]):
            _, state = step(state, query, key, value, np.array(lengths, np.int32))
    assert len(found) == 1


def test_vmap_over_layers():
    streams = [jnp.stack([x, 2 * x]) for x in tokens(7)]
    states = jax.tree.map(lambda x: jnp.stack([x, x]), FullCache.empty(**SIZES, capacity=8))
    outs, states = jax.jit(jax.vmap(append_and_attend))(*streams, states)
    expected = [parallel(*(x[i] for x in streams), mask.causal()) for i in (0, 1)]
    np.testing.assert_allclose(outs, expected, atol=F32, rtol=F32)
    assert states.length.shape == (2, B)


_free = jax.jit(lambda state, examples: state.free(examples))


FREED = ("full", "paged", "window", "sinks for chunks")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in FREED else SLOW) for x in CACHES]
)
def test_freed_examples_start_again(name):
    make, pattern = CACHES[name]
    query, key, value = tokens(CHUNK)
    _, state = stepper()(make(**SIZES), query, key * np.nan, value, np.full(B, CHUNK))
    state = _free(state, np.array([True, False, True]))
    out, state = stepper()(state, query, key, value, np.array([5, 0, 3]))
    assert_rows(out, parallel(query, key, value, pattern), (5, 0, 3), F32)
    np.testing.assert_array_equal(state.length, [5, 5, 3])


def test_overflow_is_refused_where_lengths_are_known():
    _, key, value = tokens(5)
    state = FullCache.empty(**SIZES, capacity=7).append(key, value, jnp.array([5, 0, 2]))
    with pytest.raises(ValueError, match=r"example 0 holds 5 tokens and would get 5 more.* 7"):
        state.append(key, value)
    pages = PagedCache.empty(
        **SIZES, pages=3, page_size=2, max_pages_per_sequence=3
    )  # fmt: skip
    with pytest.raises(ValueError, match="6 more pages are needed, but 3 of 3 are free"):
        pages.append(key, value, jnp.array([4, 4, 3]))
    ring = WindowCache.empty(**SIZES, window=2)
    ring = dataclasses.replace(ring, length=jnp.full((B,), cache.MOST_TOKENS - 3, jnp.int32))
    with pytest.raises(ValueError, match="room for 2147483647"):
        ring.append(key, value)


def test_overflow_in_a_compiled_program_gives_nan_to_those_it_concerns():
    query, key, value = tokens(5)
    full = FullCache.empty(**SIZES, capacity=7)
    pages = PagedCache.empty(
        **SIZES, pages=3, page_size=4, max_pages_per_sequence=3
    )  # fmt: skip
    ring = WindowCache.empty(**SIZES, window=2)
    near = jnp.array([cache.MOST_TOKENS - 7, 0, 0], jnp.int32)
    ring = dataclasses.replace(ring, length=near)
    for state in (full, pages, ring):
        step = stepper()
        for lengths in ([4, 2, 4], [4, 1, 0], [1, 1, 0]):
            out, state = step(state, query, key, value, jnp.array(lengths, jnp.int32))
        np.testing.assert_array_equal(state.overflowed(), [True, False, False])
        assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()


def test_quantised_storage_and_spared_tokens():
    query, key, value = tokens(20)
    key = key.at[:, :2].multiply(8.0)  # What sinks look like.
    expected = parallel(query, key, value, mask.causal())
    error = {}
    channel = jnp.abs(key[:, 2:]).max(axis=(0, 1)) / 7
    for name, dtype in {
        "8 bits": Quantisation(8),
        "4 bits": Quantisation(4),
        "4 bits per channel": (Quantisation(4, scale=channel), Quantisation(4)),
        "4 bits per channel, spared": (
            Quantisation(4, scale=channel, spared=2, spared_dtype=jnp.float32), Quantisation(4),
        ),
    }.items():  # fmt: skip
        state = FullCache.empty(**SIZES, capacity=20, dtype=dtype)
        out, state = stepper()(state, query, key, value, np.full(B, 20))
        error[name] = float(jnp.abs(out - expected).max())
        stored, _ = state.contents(jnp.float32)
        step = channel if "channel" in name else jnp.abs(key).max(-1, keepdims=True) / 7
        kept = slice(0 if "spared" in name else 2, None)
        wrong = jnp.abs(stored - key)[:, kept]
        assert (wrong <= jnp.broadcast_to(step, key.shape)[:, kept] * 0.5001).all()
    assert error["8 bits"] < error["4 bits"] / 8
    assert error["4 bits per channel, spared"] < error["4 bits per channel"] / 2
    np.testing.assert_array_equal(stored[:, :2], key[:, :2])


def test_quantised_ring_equals_its_own_numbers_in_full():
    streams = tokens(max(LENGTHS))
    make = functools.partial(SinkWindowCache.empty, **SIZES, sinks=2, window=5, chunk=3)
    chunks = plan(LENGTHS, CHUNK)
    state = make(dtype=Quantisation(8, spared=2, spared_dtype=jnp.float32))
    assert state.key.codes.dtype == jnp.int8
    found, state = feed(stepper(), state, streams, chunks, CHUNK)

    def coded(x):
        step = jnp.abs(x).max(-1, keepdims=True) / 127
        return jnp.concatenate([x[:, :2], (jnp.round(x / step) * step)[:, 2:]], axis=1)

    plain = (streams[0], coded(streams[1]), coded(streams[2]))
    expected = parallel(*plain, shown(5, 2))
    assert_rows(found, expected, LENGTHS, F32)
    freed = _free(state, np.array([True, True, True]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(freed))


def test_options_reach_attention():
    query, key, value = tokens(10)
    state = FullCache.empty(**SIZES, capacity=16).append(key, value)
    hidden = between((0, 3), (4, 16))
    bias = np.random.default_rng(3).standard_normal((1, N, 1, 16), np.float32)
    options = dict(
        softcap=5.0, scale=0.3, return_lse=True, statistics=["first_token_mass"],
    )  # fmt: skip
    found = jax.jit(functools.partial(attend_cached, **options))(
        query, state, mask=hidden, bias=bias
    )
    expected = jax.jit(functools.partial(attention, **options))(
        query, key, value, mask=mask.causal() & hidden, bias=bias[..., :10]
    )
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=F32, rtol=F32)
    options = dict(softcap=5.0, scale=0.3, splits=3)
    split = jax.jit(functools.partial(attend_cached, **options))(
        query, state, mask=hidden, bias=bias
    )
    np.testing.assert_allclose(split, expected.out, atol=F32, rtol=F32)


class Ramp(Bias):
    """A bias by position."""

    def check(self, b, n, t, s):
        pass

    def tile(self, query_start, key_start, rows, columns, t, s):
        return jnp.zeros((1, 1, rows, columns))


def test_refusals_name_what_is_wrong():
    query, key, value = tokens(4)
    full = FullCache.empty(**SIZES, capacity=8).append(key, value)
    ring = SinkWindowCache.empty(**SIZES, window=3, sinks=2, chunk=2)
    grown = ring.append(key, value)
    cases = [
        (ValueError, r"4 queries, but this SinkWindowCache .* 2 .* chunk=4",
         lambda: attend_cached(query, grown)),
        (ValueError, r"Ramp counts positions", lambda: attend_cached(query, full, bias=Ramp())),
        (ValueError, r"b=3", lambda: attend_cached(query[:2], full)),
        (ValueError, r"forgets the first token",
         lambda: attend_cached(query[:, :1], WindowCache.empty(**SIZES, window=2),
                               statistics=["first_token_mass"])),
        (NotImplementedError, r"pieces of 2, where gate",
         lambda: append_and_attend(query, key, value, ring, gate=jnp.ones(()))),
        (NotImplementedError, r"KeyBias has a key of its own",
         lambda: attend_cached(query[:, :2], grown, rotate=rope,
                               normalizer=KeyBias(jnp.zeros((1, H))))),
        (ValueError, r"4 queries do not go with 3 keys",
         lambda: append_and_attend(query, key[:, :3], value[:, :3], full)),
        (ValueError, r"\(k,h\)=\(2, 8\).*\(3, 4, 4, 8\)", lambda: full.append(query, value)),
        (ValueError, r"value must be floating, got int32",
         lambda: full.append(key, value.astype(jnp.int32))),
        (ValueError, r"4 keys do not go with 3", lambda: full.append(key, value[:, :3])),
        (ValueError, r"lengths\[1\]=5: choose from 0 to 4",
         lambda: full.append(key, value, np.array([1, 5, 0]))),
        (ValueError, r"lengths must be integers \[b\] = \(3,\)",
         lambda: full.append(key, value, np.array([1.0, 2, 0]))),
        (ValueError, r"examples must be bool", lambda: full.free(jnp.array([0, 1, 0]))),
        (ValueError, r"page_size=0",
         lambda: PagedCache.empty(**SIZES, pages=1, page_size=0, max_pages_per_sequence=1)),
        (ValueError, r"window=0", lambda: SinkWindowCache.empty(**SIZES, window=0)),
        (ValueError, r"capacity=0", lambda: FullCache.empty(**SIZES, capacity=0)),
        (ValueError, r"sinks=-1", lambda: SinkWindowCache.empty(**SIZES, window=2, sinks=-1)),
        (ValueError, r"positions='slot' .*'cache', 'absolute'",
         lambda: SinkWindowCache.empty(**SIZES, window=2, positions="slot")),
        (ValueError, r"not .*int8", lambda: FullCache.empty(**SIZES, capacity=2, dtype=jnp.int8)),
        (ValueError, r"bits=3: choose from \[2, 4, 8\]", lambda: Quantisation(3)),
        (ValueError, r"spared=3 tokens exceed the 2 slots",
         lambda: FullCache.empty(**SIZES, capacity=2, dtype=Quantisation(8, spared=3))),
        (ValueError, r"scale must be \[k,h\]",
         lambda: FullCache.empty(**SIZES, capacity=2, dtype=Quantisation(8, scale=jnp.ones(8)))),
        (ValueError, r"pages are not quantised",
         lambda: PagedCache.empty(**SIZES, pages=1, page_size=1, max_pages_per_sequence=1,
                                  dtype=Quantisation(8))),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_documentation_runs():
    for module, examples in ((cache, 6), (cache.paged, 9)):
        result = doctest.testmod(module)
        assert result.attempted >= examples and result.failed == 0
