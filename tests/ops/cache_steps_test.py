# SPDX-License-Identifier: Apache-2.0
"""A prompt and then single steps in one program: as the parallel form, in place and sharded."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnjax.ops import attention, mask
from attnjax.ops.cache import (
    FullCache,
    PagedCache,
    SinkWindowCache,
    WindowCache,
    append_and_attend,
    attend_cached,
)
from attnjax.ops.positions import rotate

B, N, K, H = 3, 4, 2, 8
F32 = 2e-5  # Contract of the core for float32.
PROMPTS = (9, 4, 0)
STEPS = 11
rope = functools.partial(rotate, base=100.0)


def tokens(length, batch=B):
    rng = np.random.default_rng(length)
    draw = lambda heads: rng.standard_normal((batch, length, heads, H)).astype(np.float32)
    return draw(N), draw(K), draw(K)


def first_and_last(sinks, window):
    """Each query sees the first tokens and the last, its own included."""
    upper = np.full((1, 1, 1, 1), sinks, np.int32)
    return mask.sliding_window(window - 1, 0) | (mask.causal() & mask.ranges(0 * upper, upper))


def pages(**sizes):
    return PagedCache.empty(**sizes, pages=15, page_size=4, max_pages_per_sequence=5)


absolute = functools.partial(SinkWindowCache.empty, positions="absolute")
CACHES = {
    "full": (functools.partial(FullCache.empty, capacity=20), mask.causal()),
    "paged": (pages, mask.causal()),
    "window": (
        functools.partial(WindowCache.empty, window=5), mask.sliding_window(4, 0),
    ),
    "sinks": (functools.partial(absolute, sinks=2, window=4), first_and_last(2, 4)),
    "sinks, chunk": (
        functools.partial(absolute, sinks=4, window=2, chunk=3), first_and_last(4, 2),
    ),
}  # fmt: skip


def single_steps(state, *streams_btnh, rotated_before=False, **options):
    """Take the streams token by token in a scan; every example gets one at each step."""

    def step(state, token):
        query, key, value = (x[:, None] for x in token)
        if rotated_before:
            positions = state.length[:, None]
            query, key = rope(query, positions), rope(key, positions)
        out, state = append_and_attend(
            query, key, value, state, rotate=None if rotated_before else rope, **options
        )
        return state, out[:, 0]

    state, outs = jax.lax.scan(step, state, [x.swapaxes(0, 1) for x in streams_btnh])
    return outs.swapaxes(0, 1), state


@pytest.mark.parametrize(
    ("name", "rotated_before"),
    [
        ("full", True), ("paged", False), ("window", True), ("sinks, chunk", False),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in (("full", False), ("paged", True), ("window", False), ("sinks", True),
                       ("sinks", False))),
    ],
)  # fmt: skip
def test_a_prompt_then_steps_of_a_scan_in_place(name, rotated_before):
    make, pattern = CACHES[name]
    query, key, value = streams = tokens(max(PROMPTS) + STEPS)
    place = np.arange(query.shape[1])[None]
    expected = attention(rope(query, place), rope(key, place), value, mask=pattern)
    lengths = np.array(PROMPTS, np.int32)
    # Behind a shorter prompt lies what must not count.
    prompt = [x[:, : max(PROMPTS)].copy() for x in streams]
    for x in prompt:
        x[np.arange(max(PROMPTS)) >= lengths[:, None]] = np.nan
    later = [
        np.stack([x[i, start : start + STEPS] for i, start in enumerate(PROMPTS)]) for x in streams
    ]

    def run(state, prompt, lengths, later):
        query, key, value = prompt
        if rotated_before:
            query, key = rope(query, place[:, : max(PROMPTS)]), rope(key, place[:, : max(PROMPTS)])
        first, state = append_and_attend(
            query, key, value, state, lengths=lengths, rotate=None if rotated_before else rope
        )
        return first, *single_steps(state, *later, rotated_before=rotated_before)

    state = make(batch=B, heads=K, width=H)
    stored = state.key
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # Nobody reads how many tokens were fresh before; kept, it can be counted with the rest.
    program = jax.jit(run, donate_argnums=0, keep_unused=True)
    program = program.lower(state, prompt, lengths, later).compile()
    # What comes out lies where the donated cache was.
    assert program.memory_analysis().alias_size_in_bytes == size
    first, outs, state = program(state, prompt, lengths, later)
    assert stored.is_deleted()
    for i, start in enumerate(PROMPTS):
        found = np.concatenate([first[i, :start], outs[i]])
        np.testing.assert_allclose(found, expected[i, : start + STEPS], atol=F32, rtol=F32)
    np.testing.assert_array_equal(state.length, lengths + STEPS)
    assert not state.overflowed().any()


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_memory_does_not_grow_with_the_steps(name):
    make, _ = CACHES[name]
    used = []
    for steps in (16, 512):
        # Time leads already: a transposed copy of the streams would grow.
        token = [jax.ShapeDtypeStruct((steps, B, heads, H), jnp.float32) for heads in (N, K, K)]

        # Only the last output is kept, so what grows could only be the cache.
        def last(state, token):
            step = lambda carry, x: (append_and_attend(*(y[:, None] for y in x), carry[1]), None)
            return jax.lax.scan(step, (jnp.zeros((B, 1, N, H)), state), token)[0]

        state = make(batch=B, heads=K, width=H)
        memory = jax.jit(last, donate_argnums=0).lower(state, token).compile().memory_analysis()
        used.append((memory.temp_size_in_bytes, memory.output_size_in_bytes))
    assert used[0] == used[1]


COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("full", 4), ("paged", None), ("window", None), ("sinks, chunk", None),
        pytest.param("full", None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_sharded_batch_and_heads_need_no_communication(name, splits):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    # Pages belong to nobody in particular: their batch stays whole.
    batch = None if name == "paged" else "data"
    state = CACHES[name][0](batch=4, heads=K, width=H)
    streams = tokens(3, batch=4)
    lengths = np.array([3, 0, 2, 1], np.int32)

    def run(state, query, key, value, lengths):
        state = state.append(key, value, lengths)
        return attend_cached(query, state, rotate=rope, splits=splits), state

    if name == "window":
        run = lambda state, query, key, value, lengths: append_and_attend(
            query, key, value, state, lengths=lengths, rotate=rope
        )

    def place(x):
        spec = P(batch, None, "model") if x.ndim == 4 else P(batch)
        return jax.device_put(x, NamedSharding(mesh, spec))

    step = jax.jit(run)
    expected, after = step(state, *streams, lengths)
    arguments = jax.tree.map(place, (state, *streams, lengths))
    program = step.lower(*arguments).compile()
    assert not COLLECTIVE.search(program.as_text())
    out, sharded = program(*arguments)
    assert len(out.sharding.device_set) == 8
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for one, two in zip(jax.tree.leaves(sharded), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert sharded.key.sharding.is_equivalent_to(place(state.key).sharding, 4)
