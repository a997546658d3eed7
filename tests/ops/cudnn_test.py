# SPDX-License-Identifier: Apache-2.0
"""What cuDNN is asked, and what is refused: no GPU here can answer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import attention, cudnn, mask
from attnjax.ops.bias import Alibi, alibi_slopes

TOLERANCE = 2e-2
"""Bfloat16 weights have eight bits, and the two formulas round them differently."""

B, T, N, K, H = 2, 32, 4, 2, 16


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch):
    monkeypatch.setattr(cudnn, "attend", functools.partial(cudnn.attend, needs_gpu=False))


@pytest.fixture
def through_xla(monkeypatch):
    """Let JAX answer by XLA what cuDNN would be asked."""
    original = jax.nn.dot_product_attention

    def answer(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return original(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)


def draw(t=T, s=T, h=H, hv=None, dtype="bfloat16", b=B):
    rng = np.random.default_rng(0)
    shapes = ((b, t, N, h), (b, s, K, h), (b, s, K, hv or h))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


LENGTHS = np.array([T, 11])

SERVED = {
    "full": dict(),
    "scale": dict(scale=0.1),
    "causal": dict(mask=mask.causal()),
    "causal_ranges": dict(
        mask=mask.ranges(np.zeros((1, 1, 1, T), int), np.arange(1, T + 1).reshape(1, 1, 1, T))
    ),
    "window": dict(mask=mask.sliding_window(5, 0)),
    "window_of_one": dict(mask=mask.sliding_window(0, 0)),
    "lengths": dict(mask=mask.padding(LENGTHS)),
    "causal_lengths": dict(mask=mask.causal() & mask.padding(LENGTHS)),
    "cross": dict(s=48),
    "cross_lengths": dict(s=48, mask=mask.padding(np.array([48, 1]))),
    "bias": dict(bias="full"),
    "bias_keys": dict(bias="keys", mask=mask.causal()),
}  # fmt: skip


def bias_of(kind):
    rng = np.random.default_rng(1)
    if kind == "keys":
        return jnp.asarray(rng.standard_normal((B, 1, 1, T)), jnp.float32)
    bias = rng.standard_normal((1, N, T, T))
    bias[:, :, 3] = -np.inf
    bias[:, 1, :, 5:9] = -np.inf
    return jnp.asarray(bias, jnp.float32)


@pytest.mark.parametrize("name", SERVED)
def test_asks_for_the_same_attention(through_xla, name):
    """Output and gradients of what cuDNN is asked, computed by XLA, are those of the reference."""
    options = dict(SERVED[name])
    arrays = draw(s=options.pop("s", T))
    if "bias" in options:
        arrays.append(bias_of(options.pop("bias")))

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, query, key, value, bias=None):
        def loss(*arrays):
            query, key, value, *bias = arrays
            out = attention(
                query, key, value, bias=bias[0] if bias else None,
                implementation=implementation, **options,
            )  # fmt: skip
            return (out.astype(jnp.float32) * jnp.arange(H)).sum(), out

        arrays = (query, key, value) if bias is None else (query, key, value, bias)
        return jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)

    expected, found = run("reference", *arrays), run("cudnn", *arrays)
    for value, other in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        value, other = (np.asarray(x, np.float32) for x in (value, other))
        scale = np.abs(value).max()
        np.testing.assert_allclose(other, value, atol=TOLERANCE * scale, rtol=TOLERANCE)


REFUSED = {
    "softcap": (dict(softcap=2.0), "softcap is not served"),
    "lse": (dict(return_lse=True), "return_lse is not served"),
    "sink": (dict(normalizer="softmax_one"), "return_lse is not served"),
    "normalizer": (dict(normalizer="softpick"), "normalizer Softpick"),
    "statistics": (dict(statistics=("entropy",)), "statistics is not served"),
    "probabilities": (dict(return_probabilities=True), "return_probabilities is not served"),
    "scores": (dict(return_scores=True), "return_scores is not served"),
    "edit": (dict(edit=lambda p: p), "edit is not served"),
    "dropout": (dict(dropout_rate=0.1, dropout_key=jax.random.key(0)), "dropout is not served"),
    "bias_object": (dict(bias=Alibi(alibi_slopes(N))), "bias objects is not served"),
    "two_sided": (dict(mask=mask.sliding_window(3, 2)), "a mask must be"),
    "cross_causal": (dict(mask=mask.causal(), s=48), "a mask must be"),
    "documents": (dict(mask=mask.documents([12, 20], causal=True)), "a mask must be"),
    "array": (dict(mask=np.tri(T, dtype=bool)), "a mask must be"),
    "segments": (dict(mask=mask.segments(np.zeros(T, int), np.zeros(T, int))), "a mask must be"),
    "heads": (dict(mask=mask.per_head([mask.causal(), mask.full()] * 2)), "a mask must be"),
    "empty_example": (dict(mask=mask.padding(np.array([T, 0]))), "a mask must be"),
    "queries": (dict(mask=mask.padding(LENGTHS, LENGTHS)), "a mask must be"),
    "run_time": (dict(mask=mask.padding(jnp.asarray(LENGTHS))), "a mask must be"),
    "float32": (dict(dtype="float32"), "float32 inputs"),
    "values": (dict(hv=24), "values as wide as keys"),
    "width": (dict(h=12), "multiple of 8"),
    "batch": (dict(b=0), "empty batch"),
    "odd": (dict(t=31, bias=np.zeros((1, 1, 1, T), np.float32)), "must be even, not 31 and 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    options, message = REFUSED[name]
    options = dict(options)
    sizes = {k: options.pop(k) for k in ("t", "s", "h", "hv", "dtype", "b") if k in options}
    with pytest.raises(NotImplementedError, match=f"^cudnn: .*{message}"):
        attention(*draw(**sizes), implementation="cudnn", **options)


def test_refuses_without_a_gpu_or_cudnn(monkeypatch):
    with pytest.raises(NotImplementedError, match="cudnn: cuDNN is not detected"):
        attention(*draw(), implementation="cudnn")
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="cudnn: needs a GPU, not cpu"):
        attention(*draw(), implementation="cudnn")


@pytest.mark.parametrize(
    ("options", "kind", "window"),
    [
        ({}, "NO_MASK", 0),
        ({"mask": mask.causal()}, "CAUSAL", 0),
        ({"mask": mask.sliding_window(7, 0)}, "CAUSAL", 8),
        ({"mask": mask.padding(LENGTHS)}, "PADDING", 0),
        ({"mask": mask.causal() & mask.padding(LENGTHS)}, "PADDING_CAUSAL", 0),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_lowers_for_cuda(monkeypatch, options, kind, window):
    """With a cuDNN claimed to be there, forward and backward become its custom calls."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    for name, answer in (("check_cudnn_version", 91_000), ("check_compute_capability", True)):
        if not hasattr(fused, name):
            pytest.skip(f"this JAX asks for cuDNN in another way than {name}")
        monkeypatch.setattr(fused, name, lambda *_, answer=answer: answer)
    loss = lambda *arrays: attention(*arrays, implementation="cudnn", **options).sum()
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*draw())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"@(__cudnn\S+?)\(", text) == [
        "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward",
    ]  # fmt: skip
    unquoted = re.sub(r"\\22|\"", "", text)
    assert set(re.findall(r"mask_type: (\w+)", unquoted)) == {kind}
    assert set(re.findall(r"sliding_window_length: (\d+)", unquoted)) == {str(window)}
