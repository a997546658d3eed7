# SPDX-License-Identifier: Apache-2.0
"""Keys and values in host memory: exact, one program, few tiles at a time."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import EMPTY_LSE, attention, mask
from attnjax.ops.normalizers import SinkLogit
from attnjax.parallel import streamed_attention

streaming = importlib.import_module("attnjax.parallel.distributed.streaming")
B, T, S, N, K, H, HV = 2, 9, 50, 4, 2, 8, 6
SLOW = pytest.mark.slow
FORWARD = 1e-5
"""Of float32 numbers of size one; tiles are summed in another order."""


def arrays(s=S, t=T):
    rng = np.random.default_rng(0)
    shapes = (B, t, N, H), (B, s, K, H), (B, s, K, HV)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize(("tile", "prefetch"), [(16, 2), (1000, 1), pytest.param(7, 5, marks=SLOW)])
def test_equals_attention(tile, prefetch):
    """The last tile is shorter, or there is one only."""
    inputs = arrays()
    options = {"mask": mask.causal(), "return_lse": True, "scale": 0.5, "softcap": 3.0}
    found = streamed_attention(*inputs, tile=tile, prefetch=prefetch, **options)
    expected = jax.jit(lambda *inputs: attention(*inputs, **options))(*inputs)
    np.testing.assert_allclose(found.out, expected.out, atol=FORWARD)
    np.testing.assert_allclose(found.lse, expected.lse, atol=FORWARD)


@pytest.mark.parametrize(
    "name",
    ["ids", *(pytest.param(x, marks=SLOW) for x in ("full", "lengths", "dense", "function", "no"))],
)
def test_masks(name):
    rng = np.random.default_rng(1)
    seen = {
        "full": None,
        "ids": mask.segments(rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))),
        "lengths": mask.padding(np.array([3, 50])),
        "dense": rng.random((B, N, T, S)) < 0.2,
        "function": mask.predicate(lambda q, k: (q + k) % 3 == 0) & mask.causal(),
        "no": mask.padding(np.array([0, 0])),
    }[name]
    inputs = arrays()
    options = {"mask": seen, "return_lse": True, "normalizer": SinkLogit(jnp.arange(4.0))}
    found = streamed_attention(*inputs, tile=16, **options)
    expected = jax.jit(lambda *inputs: attention(*inputs, **options))(*inputs)
    np.testing.assert_allclose(found.out, expected.out, atol=FORWARD)
    np.testing.assert_allclose(found.lse, expected.lse, atol=FORWARD)


def test_one_program_and_few_tiles_ahead(monkeypatch):
    """Tiles are never traced again; no more than `prefetch` are sent before they are needed."""
    traces, steps, most = [], [], []
    core, step, put = streaming.attention, streaming._step, jax.device_put
    sent = []

    def counted(*args, **options):
        traces.append(args[1].shape)
        return core(*args, **options)

    def counting_step(*args, **options):
        most.append(len(sent) - len(steps))
        steps.append(1)
        return step(*args, **options)

    def counting_put(x, *args):
        if isinstance(x, tuple) and len(x) == 2:
            sent.append(x[0].shape)
        return put(x, *args)

    monkeypatch.setattr(streaming, "attention", counted)
    monkeypatch.setattr(streaming, "_step", counting_step)
    monkeypatch.setattr(jax, "device_put", counting_put)
    query, key, value = arrays(s=103)
    streamed_attention(query, key, value, mask.causal(), tile=10, prefetch=3)
    assert len(steps) == 11 and set(sent) == {(B, 10, K, H)}
    assert max(most) == 3
    assert traces.count((B, 10, K, H)) == 1
    traces.clear()
    streamed_attention(query, key, value, mask.sliding_window(40, 0), tile=10)
    assert traces.count((B, 10, K, H)) == 0
    # 9 queries at the end and 40 keys before them: five of the eleven tiles are never sent.
    assert len(sent) == 11 + 6


def test_nothing_is_materialised():
    """Temporary memory of a step does not grow with the number of keys."""
    query = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    tile = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    state = (query, jax.ShapeDtypeStruct((1, 1, 4096), jnp.float32))
    start = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = streaming._step.lower(
        query, None, state, tile, tile, start, scale=0.25, softcap=None, implementation=None,
        s=2**20,
    ).compile()  # fmt: skip
    # A tile's scores would take 64 MiB, all of them 16 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**24


def test_low_precision_and_empty_rows():
    query, key, value = (np.asarray(x, jnp.bfloat16) for x in arrays())
    found = streamed_attention(
        query, key, value, mask.padding(np.array([0, 50])), tile=16, return_lse=True
    )
    assert found.out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.out[0].astype(np.float32), 0)
    np.testing.assert_array_equal(found.lse[0], np.float32(EMPTY_LSE))


def test_refusals():
    query, key, value = arrays()
    with pytest.raises(ValueError, match="for inference and runs on the host"):
        jax.grad(lambda query: streamed_attention(query, key, value).sum())(query)
    with pytest.raises(ValueError, match="host_key must be a NumPy array in host memory"):
        streamed_attention(query, jnp.asarray(key), value)
    with pytest.raises(ValueError, match=r"value axis s .* has size 4"):
        streamed_attention(query, key, value[:, :4])
    for name in ("tile", "prefetch"):
        with pytest.raises(ValueError, match=f"{name}=0: must be a whole number"):
            streamed_attention(query, key, value, **{name: 0})
    with pytest.raises(NotImplementedError, match="no log-sum-exp to merge by"):
        streamed_attention(query, key, value, normalizer="sigmoid")
    both = jax.device_put(query, jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x")))
    with pytest.raises(ValueError, match="query is on 2 devices"):
        streamed_attention(both, key, value)


def test_example_of_the_module():
    assert doctest.testmod(streaming).failed == 0
