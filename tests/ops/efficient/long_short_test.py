# SPDX-License-Identifier: Apache-2.0
"""Long-short attention against a loop over queries in float64, and against the released code."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import efficient

FOLDER = pathlib.Path(__file__).parents[2] / "goldens"
SPEC = importlib.util.spec_from_file_location(
    "make_efficient_states", FOLDER / "make_efficient_states.py"
)
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

B, T, D, N = 2, 27, 12, 2
H = D // N
SAME = 1e-5  # float32 sums in another order
HALF = 1e-1  # eight bits of mantissa, through norms and two products

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Three tiles of queries, the last one short; one tile shorter than the window; no memory.
CAUSAL = {
    "tiles": {"window": 7, "chunk": 4, "rank": 2, "memory": 4},
    "one tile": {"window": 40, "chunk": 5, "memory": 10},
    "no memory": {"window": 3, "chunk": 6, "memory": 0},
}
BOTH = {
    "odd": {"landmarks": 3, "window": 5},
    "convolution": {"landmarks": 2, "window": 4, "conv": 3},
}


OTHERS = ("one tile", "no memory")


@functools.cache
def made(case):
    causal = case in CAUSAL
    attention = efficient.make("long_short", causal=causal, **(CAUSAL | BOTH)[case])
    rng = np.random.default_rng(0)
    normal = lambda shape: rng.standard_normal(shape, np.float32)
    params = jit(lambda key: attention.init(key, D, N))(jax.random.key(0))
    # Nothing is zero that would not be after training.
    params = jax.tree.map(lambda x: np.asarray(x) + 0.3 * normal(x.shape), params)
    return attention, params, jnp.asarray(normal((B, T, D)))


def heads(params, name, x):
    part = params[name]
    return np.einsum("td,dnh->tnh", x, part["kernel"]) + part.get("bias", 0)


def normal(part, x):
    flat = x.reshape(len(x), -1)
    centred = flat - flat.mean(axis=-1, keepdims=True)
    flat = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return (flat * part["scale"] + part["bias"]).reshape(x.shape)


def softmax(x, axis):
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def waves(distance):
    angle = distance * 10_000.0 ** (-np.arange(0, D, 2) / D)
    return np.concatenate([np.sin(angle), np.cos(angle)])


def position(params, name, distance):
    return heads(params, name, waves(distance)[None])[0]


def both_ways_by_hand(attention, params, x, valid):
    """One example of the noncausal form, `[t,d]`."""
    query, raw_key, raw_value = (heads(params, name, x) for name in ("query", "key", "value"))
    key, value = (normal(params["norm_window"], y) for y in (raw_key, raw_value))
    logits = np.where(valid[:, None, None], heads(params, "pool", x), -np.inf)
    weights = softmax(logits, axis=0)
    far_key, far_value = (
        normal(params["norm_pool"], np.einsum("tnr,tnh->rnh", weights, y)) for y in (key, value)
    )
    w, out = attention.reach, np.zeros((T, N, H))
    beside = max(w // 2, 1)
    for i in range(T):
        start = i // w * w
        near = [j for j in range(start - beside, start + w + beside) if 0 <= j < T and valid[j]]
        keys = np.concatenate([far_key, key[near]])
        values = np.concatenate([far_value, value[near]])
        shares = softmax(np.einsum("nh,snh->sn", query[i], keys) / np.sqrt(H), axis=0)
        out[i] = np.einsum("sn,snh->nh", shares, values)
        for offset in range(attention.conv):
            j = i - offset + attention.conv // 2
            if 0 <= j < T and valid[j]:
                out[i] += params["conv"][:, offset, None] * value[j]
    return np.einsum("tnh,nhd->td", out, params["out"]["kernel"]) + params["out"]["bias"]


def causal_by_hand(attention, params, x, valid):
    """One example of the causal form, `[t,d]`."""
    query, raw_key, raw_value = (heads(params, name, x) for name in ("query", "key", "value"))
    logits, c, w = heads(params, "pool", x), attention.chunk, attention.reach
    zeros = np.zeros((1, N, H))
    key, value = (normal(params["norm_window"], y) for y in (raw_key, raw_value))
    zero_near = normal(params["norm_window"], zeros)[0]
    zero_far = normal(params["norm_pool"], zeros)[0]
    far = [(zero_far, zero_far, True)] * (attention.memory // c * attention.rank)
    for start in range(0, T, c):
        rows = [j for j in range(start, min(start + c, T)) if valid[j]]
        for r in range(attention.rank):
            if not rows:
                far.append((zero_far, zero_far, False))
                continue
            weights = softmax(logits[rows, :, r], axis=0)
            pooled = [np.einsum("sn,snh->nh", weights, y[rows])[None] for y in (raw_key, raw_value)]
            far.append((*(normal(params["norm_pool"], y)[0] for y in pooled), True))
    out = np.zeros((T, N, H))
    scale = H**-0.5
    for i in range(T):
        scores, values = [], []
        seen = (attention.memory // c + i // c) * attention.rank
        for j, (far_key, far_value, exists) in enumerate(far[:seen]):
            if exists:
                place = position(params, "chunk_position", seen - 1 - j)
                scores.append(np.sum(scale * query[i] * (far_key + place), axis=-1))
                values.append(far_value)
        for j in range(i - w + 1, i + 1):
            if -attention.memory <= j < 0 or (j >= 0 and valid[j]):
                one_key, one_value = (zero_near,) * 2 if j < 0 else (key[j], value[j])
                place = position(params, "window_position", i - j)
                content = (scale * query[i] + params["content_bias"]) * one_key
                scores.append(
                    np.sum(content + (scale * query[i] + params["position_bias"]) * place, axis=-1)
                )
                values.append(one_value)
        if scores:
            out[i] = np.einsum("sn,snh->nh", softmax(np.stack(scores), axis=0), np.stack(values))
    return np.einsum("tnh,nhd->td", out, params["out"]["kernel"])


@pytest.mark.parametrize("case", [*CAUSAL, *BOTH])
def test_output_equals_a_loop_over_queries(case):
    attention, params, x = made(case)
    hand = causal_by_hand if attention.causal else both_ways_by_hand
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    valid = np.arange(T) < np.array([[T], [T - 8]])
    valid[0, 3:13] = not attention.causal  # A hole as large as chunks.
    out = jit(attention.apply)(params, x, query_valid=jnp.asarray(valid))
    for i in range(B):
        expected = hand(attention, exact, np.asarray(x[i], np.float64), valid[i])
        np.testing.assert_allclose(out[i][valid[i]], expected[valid[i]], rtol=0, atol=SAME)


@pytest.mark.parametrize(
    "case", ["tiles", *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_steps_and_prefixes_equal_the_parallel_form(case):
    attention, params, x = made(case)
    stream = attention.empty_stream(B, D, N, T)

    def step(stream, x_bd):
        out, stream = attention.step(params, x_bd[:, None], stream)
        return stream, out[:, 0]

    _, outs = jit(lambda x: jax.lax.scan(step, stream, jnp.swapaxes(x, 0, 1)))(x)
    expected = jit(attention.apply)(params, x)
    np.testing.assert_allclose(jnp.swapaxes(outs, 0, 1), expected, rtol=0, atol=SAME)
    if case == "tiles":
        prefix = jit(attention.apply)(params, x[:, :13])
        np.testing.assert_allclose(prefix, expected[:, :13], rtol=0, atol=SAME)


@pytest.mark.parametrize("case", ["tiles", "convolution"])
def test_half_precision_and_gradients(case):
    attention, params, x = made(case)
    run = jit(attention.apply)
    out = run(params, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    expected = run(params, x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=HALF * np.abs(expected).max())
    gradients = jit(jax.grad(lambda p: jnp.sum(attention.apply(p, x) ** 2)))(params)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        assert np.abs(leaf).max() > 1e-6 or name == "pool/bias", name


@pytest.mark.parametrize("name", [name for name in golden.CASES if "long_short" in name])
def test_output_equals_the_release(name):
    kind, options, _, _ = golden.CASES[name]
    ours = {
        "chunk_size": "chunk", "chunk_rank": "rank", "window_size": "window", "mem_len": "memory",
        "num_landmarks": "landmarks",
    }  # fmt: skip
    options = {ours[option]: value for option, value in options.items()}
    attention = efficient.make("long_short", causal=kind == "CausalLS", **options)
    valid = golden.valid(name)
    valid = None if valid is None else jnp.asarray(valid)
    out = jit(attention.apply)(golden.params(name), golden.inputs(name), query_valid=valid)
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        expected = stored[name]
    kept = ... if valid is None else valid
    np.testing.assert_allclose(out[kept], expected[kept], rtol=0, atol=2 * SAME)
    if kind == "CausalLS" and valid is not None:
        # The release reads padding, which it can only show at padding itself: it is at the end.
        released = jit(efficient.make("long_short", causal=True, compat=True, **options).apply)
        out = released(golden.params(name), golden.inputs(name), query_valid=valid)
        np.testing.assert_allclose(out, expected, rtol=0, atol=2 * SAME)


def test_the_released_causal_form_reads_padding():
    attention, params, x = made("tiles")
    valid = jnp.arange(T) >= jnp.array([[0], [5]])
    other = jnp.where(valid[..., None], x, 9.0)
    for compat in (False, True):
        attention = efficient.make("long_short", causal=True, compat=compat, **CAUSAL["tiles"])
        run = jit(attention.apply)
        moved = np.abs(run(params, x, query_valid=valid) - run(params, other, query_valid=valid))
        assert (moved[valid].max() > SAME) == compat


def test_defaults_are_those_of_the_release():
    assert efficient.make("long_short").reach == 15
    assert efficient.make("long_short", causal=True).reach == 256
    count = lambda p: sum(leaf.size for leaf in jax.tree.leaves(p))
    shapes = lambda **o: jax.eval_shape(
        lambda key: efficient.make("long_short", **o).init(key, 512, 8), jax.random.key(0)
    )
    # Four maps with biases, 16 landmarks for each of 8 heads, two norms.
    assert count(shapes()) == 4 * 513 * 512 + 513 * 128 + 2 * 1024
    # Six maps, one of them with a bias, one vector for each head, two norms, two biases.
    assert count(shapes(causal=True)) == 6 * 512**2 + 512 + 513 * 8 + 2 * 1024 + 2 * 512


def test_wrong_options_are_refused():
    for options, message in (
        ({"window": 0}, "window=0"),
        ({"landmarks": 0}, "landmarks=0"),
        ({"causal": True, "memory": 33}, "a multiple of chunk=32"),
        ({"causal": True, "conv": 3}, "only the noncausal form"),
        ({"conv": -1}, "conv=-1"),
        ({"rotary_base": 1e4}, "nothing to rotate"),
        ({"cross": True}, "no noncausal_cross form"),
    ):
        with pytest.raises(ValueError, match=message):
            efficient.make("long_short", **options)
    with pytest.raises(ValueError, match="even width"):
        efficient.make("long_short", causal=True).init(jax.random.key(0), 9, 3)
