# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as complex numbers, sinusoids, positions of packed sequences, norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops.positions import Rotary, query_key_norm, rotate, segment_positions, sinusoids

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 3, 8)).astype(np.float32)
POSITIONS = RNG.integers(0, 40, (2, 5))
TOLERANCE = 1e-5
"""Angles of some dozens of radians in float32."""


def turned(x, positions, width, layout, base=10_000.0):
    """Multiply pairs, as complex numbers, by e^(i position frequency)."""
    x = np.asarray(x, np.float64)
    result = x.copy()
    for i in range(width // 2):
        a, b = (i, i + width // 2) if layout == "half" else (2 * i, 2 * i + 1)
        angle = np.asarray(positions)[..., None] * base ** (-2 * i / width)
        pair = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angle)
        result[..., a], result[..., b] = pair.real, pair.imag
    return result


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("width", [None, 4])
def test_rotation_is_complex_multiplication(layout, width):
    out = rotate(X, POSITIONS, layout=layout, width=width)
    expected = turned(X, POSITIONS, width or 8, layout)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)
    shared = rotate(X, np.arange(5) + 0.5, layout=layout, width=width, base=500.0)
    expected = turned(X, np.tile(np.arange(5) + 0.5, (2, 1)), width or 8, layout, 500.0)
    np.testing.assert_allclose(shared, expected, atol=TOLERANCE)


def test_long_wavelengths_are_stretched():
    """LLaMA 3.1's rule, pair by pair."""
    factor, low, high, length = scaling = (8.0, 0.5, 2.0, 16)
    rotary = Rotary.of({"base": 100.0, "layout": "interleaved", "scaling": list(scaling)})
    expected, kinds = X.astype(np.float64), set()
    for i in range(4):
        frequency = 100.0 ** (-i / 4)
        wavelength = 2 * np.pi / frequency
        if wavelength > length / low:
            kind, stretched = "far", frequency / factor
        elif wavelength < length / high:
            kind, stretched = "near", frequency
        else:
            share = (length / wavelength - low) / (high - low)
            kind, stretched = "between", (1 - share) * frequency / factor + share * frequency
        kinds.add(kind)
        pair = X[..., 2 * i] + 1j * X[..., 2 * i + 1]
        pair = pair * np.exp(1j * POSITIONS[..., None] * stretched)
        expected[..., 2 * i], expected[..., 2 * i + 1] = pair.real, pair.imag
    assert kinds == {"far", "near", "between"}
    np.testing.assert_allclose(rotary.turn(X, POSITIONS), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "thirds"}, "half"),
        ({"base": -1.0}, "base"),
        ({"scaling": (8.0, 4.0, 1.0, 16)}, "low < high"),
        ({"theta": 3.0}, "'theta' is no field"),
    ],
)
def test_rotary_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        Rotary.of(fields)


def test_layouts_differ_by_a_permutation():
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    half = rotate(X[..., order], POSITIONS, layout="half")
    np.testing.assert_allclose(half, rotate(X, POSITIONS, layout="interleaved")[..., order])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_distances_alone(layout):
    query, key = X, X[::-1]
    score = lambda shift: jnp.einsum(
        "btnh,bsnh->bnts",
        rotate(query, np.arange(5) + shift, layout=layout),
        rotate(key, np.arange(5) + shift, layout=layout),
    )
    np.testing.assert_allclose(score(0), score(37), atol=10 * TOLERANCE)
    norm = lambda x: np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norm(rotate(X, POSITIONS, layout=layout)), norm(X), rtol=TOLERANCE)


def test_rotation_keeps_dtypes_and_gradients():
    assert rotate(X.astype(jnp.bfloat16), np.arange(5)).dtype == jnp.bfloat16
    # The inverse rotation is the transpose.
    _, pull = jax.vjp(lambda x: rotate(x, POSITIONS), jnp.asarray(X))
    np.testing.assert_allclose(pull(X)[0], rotate(X, -POSITIONS), atol=TOLERANCE)
    with jax.enable_x64(True):
        x = X.astype(np.float64)
        np.testing.assert_allclose(
            rotate(x, POSITIONS), turned(x, POSITIONS, 8, "half"), atol=1e-12
        )


def test_sinusoids():
    table = sinusoids(np.arange(6), 8)
    for p, i in np.ndindex(6, 4):
        angle = p / 10_000 ** (2 * i / 8)
        np.testing.assert_allclose(
            table[p, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6
        )
    half = sinusoids(np.arange(6), 8, layout="half")
    np.testing.assert_array_equal(half, np.concatenate([table[:, ::2], table[:, 1::2]], axis=1))
    assert sinusoids(POSITIONS, 4).shape == (2, 5, 4)


def test_positions_restart_in_every_segment():
    ids = np.array([[0, 0, 0, 1, 1, 0], [5, 6, 6, 6, 6, 6]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(segment_positions(ids), expected)
    np.testing.assert_array_equal(jax.jit(segment_positions)(ids[0]), expected[0])


def test_norms():
    scale = RNG.standard_normal((3, 8)).astype(np.float32)
    query, key = query_key_norm(X, X[:, :, :1], query_scale=scale, key_scale=scale[0], epsilon=0.0)
    rms = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(query, rms(X) * scale, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(key, rms(X[:, :, :1]) * scale[0], rtol=TOLERANCE, atol=TOLERANCE)
    query, key = query_key_norm(X, X, kind="l2", query_scale=10 * np.ones((3, 1), np.float32))
    np.testing.assert_allclose(np.linalg.norm(query, axis=-1), 10, rtol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(key, axis=-1), 1, rtol=TOLERANCE)
    assert query_key_norm(X.astype(jnp.bfloat16), X)[0].dtype == jnp.bfloat16
    for kind in ("rms", "l2"):
        slope = jax.grad(lambda x: query_key_norm(x, x, kind=kind)[0].sum())(0 * X)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotate(X, np.arange(4)), r"positions must be \[t\] or \[b,t\] = \(2, 5\)"),
        (lambda: rotate(X, np.arange(5), width=3), "width=3 must be even"),
        (lambda: rotate(X, np.arange(5), width=10), "width=10 must be even and at most"),
        (lambda: rotate(X, np.arange(5), layout="spiral"), "layout 'spiral' is unknown"),
        (lambda: sinusoids(np.arange(4), 7), "width=7"),
        (lambda: query_key_norm(X, X, kind="layer"), "kind 'layer'"),
        (lambda: query_key_norm(X, X, key_scale=np.ones(7)), r"key_scale \(7,\) does not fit"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
