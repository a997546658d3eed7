# SPDX-License-Identifier: Apache-2.0
"""What S4D and long-short attention cost: operations of the traced program, memory by length."""

import math

import jax
import jax.numpy as jnp
import pytest

from attnjax.ops import efficient
from attnjax.ops.attention import attention as core

D, N = 12, 3

CASES = {
    "s4d": ("s4d", {}),
    "s4d causal": ("s4d", {"causal": True}),
    "long_short": ("long_short", {"landmarks": 3, "window": 5}),
    "long_short causal": (
        "long_short", {"causal": True, "chunk": 4, "rank": 2, "window": 7, "memory": 8},
    ),
}  # fmt: skip


def matmul_flops(jaxpr):
    """Count multiply-adds of matrix products twice, in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            products = math.prod(shape[axis] for axis in contracted)
            total += 2 * products * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = (getattr(value, "jaxpr", value) for value in equation.params.values())
        total += times * sum(matmul_flops(x) for x in inner if hasattr(x, "eqns"))
    return total


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_of_the_traced_program(case):
    name, options = CASES[case]
    attention = efficient.make(name, **options)
    length, exact = 21, []

    def counted(query, key, value, mask):
        """Exact attention, of which only pairs that see each other count, as in a kernel."""
        exact.append(key.shape[1])
        return core(query, key, value, mask=mask, implementation="reference")

    params = jax.eval_shape(lambda key: attention.init(key, D, N), jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
    traced = jax.make_jaxpr(lambda p, x: attention.apply(p, x, core=counted))(params, x)
    found = matmul_flops(traced.jaxpr)
    if exact:
        r, w = attention.landmarks, attention.reach
        found -= 4 * length * (exact[0] - (r + w + 2 * (w // 2))) * D
    expected = attention.flops(length, length, D, N)
    if name == "s4d":
        expected -= attention.transform_flops(length, D, N)
    assert found == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["s4d", "s4d causal", "long_short", "long_short causal"])
def test_temporaries_grow_linearly(case):
    """Forward and backward, from 1,024 to 8,192 tokens."""
    name, options = CASES[case]
    # Defaults of the release, but for the memory, which would hide the growth.
    options = {"causal": options.get("causal", False)}
    attention = efficient.make(name, **options | ({"memory": 0} if name == "long_short" else {}))
    params = jax.eval_shape(lambda key: attention.init(key, 64, 2), jax.random.key(0))

    def used(length):
        x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
        run = jax.jit(jax.grad(lambda p, x: jnp.sum(attention.apply(p, x) ** 2)))
        return run.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    sizes = [used(2**i) for i in (10, 11, 12, 13)]
    assert sizes[-1] < 1.25 * 8 * sizes[0]
    assert sizes[-1] < 1.25 * 2 * sizes[-2]
