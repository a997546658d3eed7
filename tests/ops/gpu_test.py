# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels on a GPU, against `reference` with exact products: `pytest -m gpu`.

Run with `JAX_PLATFORMS=cuda`; skipped where there is no GPU. The emulated kernels are tested in
`pallas_gpu_test`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import TokenMass, attention, mask
from attnjax.ops.bias import Bias
from attnjax.ops.cases import CASES
from attnjax.ops.normalizer import EMPTY_LSE, SoftmaxFamily

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Of the largest value: rounding of the inputs' dtype, in sums of a hundred terms."""

STATISTICS = ("key_mass", "entropy", "max_probability", "first_token_mass")


def results(implementation, arrays, cotangent, bias, options):
    """Return output, gradients and statistics of a call by name."""
    is_flash = implementation != "cudnn"

    def loss(arrays, bias):
        found = attention(
            *arrays, bias=bias, implementation=implementation, return_lse=is_flash, **options
        )
        found = found if is_flash else {"out": found}
        out = found.out if is_flash else found["out"]
        total = (out.astype(jnp.float32) * cotangent).sum()
        if is_flash:
            lse = jnp.where(found.lse > EMPTY_LSE / 2, found.lse, 0)
            total += (lse * cotangent[..., 0].swapaxes(1, 2)).sum()
        return total, {"out": out, **(found.statistics if is_flash else {})}

    gradients, named = jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays, bias)
    named |= dict(zip(("dquery", "dkey", "dvalue"), gradients[0], strict=True))
    return named if bias is None else named | {"dbias": gradients[1]}


def compare(implementation, arrays, cotangent, bias=None, **options):
    """Hold an implementation to the reference; both as compiled programs."""
    tolerance = TOLERANCE[arrays[0].dtype.name]
    found, expected = (
        jax.jit(lambda *x, name=name: results(name, *x, options))(arrays, cotangent, bias)
        for name in (implementation, "reference")
    )
    for name in found:
        value, other = (np.asarray(x[name], np.float64) for x in (expected, found))
        largest = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(
            other, value, rtol=tolerance, atol=tolerance * largest, err_msg=name
        )


def cotangent_of(query, width):
    draw = np.random.default_rng(1).standard_normal((*query.shape[:3], width))
    return jnp.asarray(draw, jnp.float32)


def served(case):
    options = case.options()
    is_softmax = isinstance(options.get("normalizer", SoftmaxFamily()), SoftmaxFamily)
    return is_softmax and not isinstance(options.get("bias"), Bias)


@pytest.mark.parametrize("name", [case.name for case in CASES if served(case)])
def test_cases(name):
    """Every case of the core that the kernels serve, in float32 with exact products."""
    case = {case.name: case for case in CASES}[name]
    arrays, options = case.arrays(), case.options()
    bias = options.pop("bias", None)
    with jax.default_matmul_precision("highest"):
        compare("pallas_gpu", arrays, cotangent_of(arrays[0], case.hv), bias, **options)


MASKS = {
    "full": lambda t: mask.full(),
    "causal": lambda t: mask.causal(),
    "window": lambda t: mask.sliding_window(100, 0),
    "documents": lambda t: mask.documents([t // 3, t - t // 3], causal=True),
    "global": lambda t: mask.global_sliding_window(64, 8),
    "array": lambda t: mask.array(np.random.default_rng(0).random((2, 1, t, t)) < 0.3),
}


def draw(dtype, t, n, k, h):
    rng = np.random.default_rng(0)
    shapes = ((2, t, n, h), (2, t, k, h), (2, t, k, h))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("h", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_at_full_tiles(name, dtype, h):
    """Tiles as the rule chooses them, lengths that are no multiple of them, grouped heads."""
    if name not in ("causal", "documents") and h in (80, 256):
        pytest.skip("widths are independent of masks")
    arrays = draw(dtype, 1000, 4, 2, h)
    with jax.default_matmul_precision("highest"):
        compare("pallas_gpu", arrays, cotangent_of(arrays[0], h), mask=MASKS[name](1000))


def test_statistics():
    arrays = draw("bfloat16", 500, 4, 2, 64)
    wanted = (*STATISTICS, TokenMass(np.random.default_rng(2).random((1, 500)) < 0.3))
    compare(
        "pallas_gpu", arrays, cotangent_of(arrays[0], 64), mask=mask.causal(), statistics=wanted
    )


def test_dropout_drops_the_same_weights():
    arrays = draw("float32", 300, 4, 2, 64)
    options = dict(dropout_rate=0.3, dropout_key=jax.random.key(0), mask=mask.causal())
    with jax.default_matmul_precision("highest"):
        compare("pallas_gpu", arrays, cotangent_of(arrays[0], 64), **options)


@pytest.mark.parametrize("name", ["full", "causal", "window"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn(name, dtype):
    arrays = draw(dtype, 512, 4, 2, 64)
    compare("cudnn", arrays, cotangent_of(arrays[0], 64), mask=MASKS[name](512))


def test_cudnn_with_rows_that_a_bias_empties():
    arrays = draw("bfloat16", 256, 4, 4, 64)
    bias = np.zeros((1, 4, 256, 256), np.float32)
    bias[:, :, 3] = -np.inf
    compare("cudnn", arrays, cotangent_of(arrays[0], 64), jnp.asarray(bias))


def test_the_default_choice_runs_in_a_scan_under_grad():
    """What models do: layers in a scan, mixed precision, the core's own choice."""
    arrays = draw("bfloat16", 512, 4, 2, 64)

    def loss(implementation, query):
        layer = lambda x, _: (
            x + attention(x, *arrays[1:], mask=mask.causal(), implementation=implementation),
            None,
        )
        return jax.lax.scan(layer, query, None, length=3)[0].astype(jnp.float32).sum()

    found, expected = (
        jax.jit(jax.grad(lambda q, name=name: loss(name, q)))(arrays[0])
        for name in (None, "reference")
    )
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=3e-2 * largest
    )
