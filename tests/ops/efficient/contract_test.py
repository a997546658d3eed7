# SPDX-License-Identifier: Apache-2.0
"""What every attention of CAB promises: its patterns, causality, padding, decoding, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import efficient
from attnjax.ops.efficient import ATTENTIONS, PATTERNS

B, T, S, D, N = 2, 14, 11, 8, 2
SAME = 1e-5
"""Between two ways to compute one thing in float32."""
HALF = 0.08
"""Of bfloat16 beside float32, for values of size 1."""

TABLE = {
    "abc": "NS CS NC CC",
    "cosformer": "NS NC",
    "lara": "NS",
    "local": "NS CS",
    "long_short": "NS CS",
    "nystrom": "NS",
    "performer": "NS NC CC",
    "prob_sparse": "NS",
    "s4d": "NS CS",
    "softmax": "NS CS NC CC",
}
"""The support table of CAB, with the patterns' initials."""

OPTIONS = {
    "abc": {"landmarks": 3},
    "lara": {"landmarks": 3},
    "local": {"window": 3},
    "long_short": {
        "noncausal_self": {"landmarks": 3, "window": 4},
        "causal_self": {"chunk": 2, "window": 4},
    },
    "nystrom": {"landmarks": 3, "kernel": 3},
    "performer": {"features": 6},
    "prob_sparse": {"factor": 1},
    "s4d": {"states": 3},
}
"""Sizes that leave something to approximate."""

CASES = [
    (name, pattern)
    for name in ATTENTIONS
    for pattern in PATTERNS
    if pattern in ATTENTIONS[name].patterns
]
CAUSAL = [name for name, pattern in CASES if pattern == "causal_self"]


def made(name, pattern):
    causal, _, cross = pattern.partition("_")
    options = OPTIONS.get(name, {})
    attention = efficient.make(
        name, causal=causal == "causal", cross=cross == "cross", **options.get(pattern, options)
    )
    keys = jax.random.split(jax.random.key(0), 3)
    params = attention.init(keys[0], D, N)
    x = jax.random.normal(keys[1], (B, T, D))
    context = jax.random.normal(keys[2], (B, S, D)) if attention.cross else None
    return attention, params, x, context


def initials(pattern):
    return "".join(part[0].upper() for part in pattern.split("_"))


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_those_of_the_table(name, pattern):
    assert (initials(pattern) in TABLE[name].split()) == (pattern in ATTENTIONS[name].patterns)
    causal, _, cross = pattern.partition("_")
    flags = {"causal": causal == "causal", "cross": cross == "cross"}
    if pattern in ATTENTIONS[name].patterns:
        assert efficient.make(name, **flags).pattern == pattern
    else:
        with pytest.raises(ValueError, match=f"has no {pattern} form; it has"):
            efficient.make(name, **flags)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_padding_dtypes_and_gradients(name, pattern):
    """One compilation: whatever stands at padding, valid outputs and gradients are the same."""
    attention, params, x, context = made(name, pattern)
    x_valid = np.arange(T) < np.array([[T], [T - 4]])
    c_valid = np.arange(S) < np.array([[S - 3], [2]])

    def loss(params, x, context):
        out = attention.apply(
            params, x, context, query_valid=x_valid, key_valid=None if context is None else c_valid
        )
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return jnp.sum(jnp.where(x_valid[..., None], out, 0) * weights), out

    both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, grads_x), out = both(params, x, context)
    spoilt = jnp.where(x_valid[..., None], x, 100.0)
    other = None if context is None else jnp.where(c_valid[..., None], context, -30.0)
    (grads_2, _), out_2 = both(params, spoilt, other)
    np.testing.assert_allclose(out_2[x_valid], out[x_valid], atol=SAME)
    chex_equal = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)
    jax.tree.map(chex_equal, grads_2, grads)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, grads_x, out, out_2)))
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(leaf).max() > 0
    ]
    assert all("key" in path and "bias" in path for path in dead), dead


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_padding_may_as_well_be_absent(name, pattern):
    """Tokens behind the end change no output; half precision stays close and keeps its dtype."""
    attention, params, x, context = made(name, pattern)
    extra = 5
    grown = lambda a: None if a is None else jnp.pad(a, ((0, 0), (0, extra), (0, 0)))
    valid = lambda a: (
        None if a is None else jnp.arange(a.shape[1] + extra)[None].repeat(B, 0) < a.shape[1]
    )

    @jax.jit
    def several(params, x, context):
        short = attention.apply(params, x, context)
        long = attention.apply(
            params, grown(x), grown(context), query_valid=valid(x), key_valid=valid(context)
        )
        half = attention.apply(
            *jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x, context))
        )
        nothing = attention.apply(
            params, x, context, query_valid=jnp.zeros((B, T), bool),
            key_valid=None if context is None else jnp.zeros((B, S), bool),
        )  # fmt: skip
        return short, long[:, :T], half, nothing

    short, long, half, nothing = several(params, x, context)
    np.testing.assert_allclose(long, short, atol=SAME)
    assert short.dtype == jnp.float32 and half.dtype == jnp.bfloat16
    assert abs(half.astype(jnp.float32) - short).max() < HALF * max(1, abs(short).max())
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_knows_later_ones_and_steps_equal_the_whole(name):
    attention, params, x, _ = made(name, "causal_self")

    @jax.jit
    def several(params, x):
        whole = attention.apply(params, x)
        prefix = attention.apply(params, x[:, :9])
        stream = attention.empty_stream(B, D, N, T)
        step = lambda stream, x: attention.step(params, x[:, None], stream)[::-1]
        _, steps = jax.lax.scan(step, stream, jnp.swapaxes(x, 0, 1))
        return whole, prefix, jnp.swapaxes(steps[:, :, 0], 0, 1)

    whole, prefix, steps = several(params, x)
    np.testing.assert_allclose(prefix, whole[:, :9], atol=SAME)
    np.testing.assert_allclose(steps, whole, atol=SAME)
    changed, *_ = several(params, x.at[:, 9:].set(50.0))
    np.testing.assert_allclose(changed[:, :9], whole[:, :9], atol=SAME)


@pytest.mark.parametrize("name", [name for name, pattern in CASES if pattern == "causal_cross"])
def test_queries_one_by_one_equal_the_whole(name):
    attention, params, x, context = made(name, "causal_cross")
    valid = np.arange(S) < np.array([[S], [S - 4]])

    @jax.jit
    def several(params, x, context):
        whole = attention.apply(params, x, context, key_valid=valid)
        memory = attention.remember(params, context, valid)
        read = lambda _, x: (_, attention.recall(params, x[:, None], memory))
        _, single = jax.lax.scan(read, None, jnp.swapaxes(x, 0, 1))
        return whole, jnp.swapaxes(single[:, :, 0], 0, 1)

    whole, single = several(params, x, context)
    np.testing.assert_allclose(single, whole, atol=SAME)


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_gradients_are_those_of_finite_differences(name, pattern):
    attention, params, x, context = made(name, pattern)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
        params, x, context = wide(params), wide(x), wide(context)
        rng = np.random.default_rng(0)
        way = jax.tree.map(lambda a: rng.standard_normal(a.shape), (params, x))

        @jax.jit
        def along(distance):
            moved = jax.tree.map(lambda a, b: a + distance * b, (params, x), way)
            return jnp.sum(jnp.sin(attention.apply(*moved, context)))

        slope = jax.jit(jax.grad(along))(0.0)
        # Statistics are float32 in places: shorter steps drown in rounding. Longer ones meet what
        # is not smooth: rectified queries, queries that are chosen.
        step = 3e-4
        difference = (along(step) - along(-step)) / (2 * step)
        np.testing.assert_allclose(difference, slope, rtol=2e-2, atol=0.1)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="unknown attention 'nystorm': did you mean 'nystrom'"):
        efficient.make("nystorm")
    with pytest.raises(ValueError, match=r"'abc' has no option 'landmark': did you mean 'land"):
        efficient.make("abc", landmark=3)
    with pytest.raises(ValueError, match="heads=3 must divide dim=8"):
        efficient.make("softmax").init(jax.random.key(0), 8, 3)
    attention, params, x, _ = made("softmax", "causal_self")
    with pytest.raises(ValueError, match="got a context"):
        attention.apply(params, x, x)
    with pytest.raises(ValueError, match="only the causal_cross form remembers a context"):
        attention.remember(params, x)
