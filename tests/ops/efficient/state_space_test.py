# SPDX-License-Identifier: Apache-2.0
"""S4D against its recurrence in float64, token by token, and against the released code."""

import functools
import importlib.util
import math
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

B, T, D, N = 2, 19, 12, 3
SAME = 1e-5  # float32 sums in another order, and transforms
HALF = 5e-2  # eight bits of mantissa

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def made(causal, **options):
    attention = efficient.make("s4d", causal=causal, **options)
    params = jit(functools.partial(attention.init, dim=D, heads=N))(jax.random.key(0))
    params["out"]["bias"] = 0.1 * jax.random.normal(jax.random.key(1), (D,))
    return attention, params, jax.random.normal(jax.random.key(2), (B, T, D))


def scanned(params, x, backwards=False):
    """The recurrence of one way in time for all heads, `[b,t,n,d]`, without D."""
    part = slice(N, None) if backwards else slice(0, N)
    rate = (-np.exp(params["log_decay"]) + 1j * params["frequency"]) * np.ones((D, 1))
    step = np.exp(params["log_dt"])[:, None]
    output = params["output"][part] @ np.array([1, 1j])
    output = output * (np.exp(step * rate) - 1) / rate
    state, outs = np.zeros((B, D, rate.shape[1]), complex), []
    for x_bd in np.moveaxis(x[:, ::-1] if backwards else x, 1, 0):
        # The backward kernels begin at the token after.
        before = np.einsum("bdk,ndk->bnd", state, output)
        state = np.exp(step * rate) * state + x_bd[..., None]
        after = np.einsum("bdk,ndk->bnd", state, output)
        outs.append(2 * np.real(before if backwards else after))
    outs = np.stack(outs, axis=1)
    return outs[:, ::-1] if backwards else outs


def by_hand(attention, params, x, valid=None):
    """The whole attention in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64) * (1 if valid is None else np.asarray(valid)[..., None])
    mixed = scanned(params, x) + params["skip"] * x[:, :, None]
    if attention.looks_ahead:
        mixed = mixed + scanned(params, x, backwards=True)
    hidden = mixed * 0.5 * (1 + np.vectorize(math.erf)(mixed / math.sqrt(2)))
    return np.einsum("btnd,nde->bte", hidden, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.parametrize("causal", [False, True])
def test_output_equals_the_recurrence(causal):
    attention, params, x = made(causal)
    assert attention.looks_ahead != causal
    valid = jnp.arange(T) < jnp.array([[T], [12]])
    run = jit(attention.apply)
    whole = jnp.ones((B, T), bool)
    expected = by_hand(attention, params, x)
    np.testing.assert_allclose(run(params, x, query_valid=whole), expected, rtol=0, atol=SAME)
    out, expected = run(params, x, query_valid=valid), by_hand(attention, params, x, valid)
    np.testing.assert_allclose(out[valid], expected[valid], rtol=0, atol=SAME)


def test_steps_equal_the_parallel_form():
    attention, params, x = made(True)
    stream = attention.empty_stream(B, D, N, T)

    def step(stream, x_bd):
        out, stream = attention.step(params, x_bd[:, None], stream)
        return stream, out[:, 0]

    stream, outs = jit(lambda x: jax.lax.scan(step, stream, jnp.swapaxes(x, 0, 1)))(x)
    expected = jit(attention.apply)(params, x)
    np.testing.assert_allclose(jnp.swapaxes(outs, 0, 1), expected, rtol=0, atol=SAME)
    assert stream.position == T


def test_half_precision_and_gradients():
    attention, params, x = made(True)
    run = jit(attention.apply)
    out = run(params, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out, run(params, x), rtol=0, atol=HALF)
    gradients = jit(jax.grad(lambda p: jnp.sum(attention.apply(p, x) ** 2)))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_initial_values_are_those_of_the_paper():
    attention = efficient.make("s4d")
    params = jit(lambda key: attention.init(key, 512, 2))(jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "log_dt": (512,), "log_decay": (1, 8), "frequency": (1, 8), "output": (4, 512, 8, 2),
        "skip": (2, 512), "out": {"kernel": (2, 512, 512), "bias": (512,)},
    }  # fmt: skip
    # "inverse": (N / pi) (N / (1 + 2 n) - 1) for N = 16.
    np.testing.assert_allclose(params["frequency"][0, :2], [76.3944, 22.0693], rtol=1e-5)
    assert math.log(1e-3) < params["log_dt"].min() < params["log_dt"].max() < math.log(1e-1)
    # With C of unit entries, the response to a constant input has variance 1.
    rate = -np.exp(params["log_decay"]) + 1j * params["frequency"]
    response = 2 * np.abs(params["output"] @ np.array([1, 1j]) / rate) ** 2
    np.testing.assert_allclose(response.sum(axis=-1).mean(), 1, atol=0.1)


@pytest.mark.parametrize("name", ["s4d", "s4d bidirectional"])
def test_output_equals_the_release(name):
    _, options, _, _ = golden.CASES[name]
    attention = efficient.make("s4d", compat=True, **options)
    out = jit(attention.apply)(golden.params(name), golden.inputs(name))
    with np.load(golden.GOLDENS, allow_pickle=False) as stored:
        np.testing.assert_allclose(out, stored[name], rtol=0, atol=2 * SAME)


def test_the_release_reads_padding_and_looks_backwards_only():
    valid = golden.valid("s4d")
    first = valid[:, ::-1]  # Padding at the start is what a causal form meets.
    params, x = golden.params("s4d"), jnp.asarray(golden.inputs("s4d"))
    other = jnp.where(first[..., None], x, 9.0)
    for compat in (False, True):
        attention = efficient.make("s4d", causal=True, compat=compat)
        run = jit(attention.apply)
        out, moved = (run(params, y, query_valid=first) for y in (x, other))
        assert (np.abs(out - moved)[first].max() > SAME) == compat
    assert not efficient.make("s4d", compat=True).looks_ahead


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="cannot look ahead"):
        efficient.make("s4d", causal=True, bidirectional=True)
    with pytest.raises(ValueError, match="states=0"):
        efficient.make("s4d", states=0)
    with pytest.raises(ValueError, match="nothing to rotate"):
        efficient.make("s4d", rotary_base=1e4)
    with pytest.raises(ValueError, match="no noncausal_cross form"):
        efficient.make("s4d", cross=True)
    with pytest.raises(ValueError, match="got a context"):
        attention, params, x = made(True)
        attention.apply(params, x, x)
    with pytest.raises(ValueError, match="only the causal_self form"):
        efficient.make("s4d").step(params, x[:, :1], None)
