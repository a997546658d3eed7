# SPDX-License-Identifier: Apache-2.0
"""Attentions against the released code of CAB: equal where it is right, different where it is not.

Outputs of the release are in tests/goldens/efficient.npz, see make_efficient.py.
"""

import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.ops import efficient
from attnjax.ops.efficient.performer import Performer
from attnjax.ops.efficient.prob_sparse import ProbSparse

FOLDER = pathlib.Path(__file__).parents[2] / "goldens"
SPEC = importlib.util.spec_from_file_location("make_efficient", FOLDER / "make_efficient.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

SAME = 2e-5  # float32 sums in another order
DIFFERENT = 1e-2

OURS = {
    "MultiheadAttention": "softmax",
    "LocalAttention": "local",
    "ABC": "abc",
    "NystromAttention": "nystrom",
    "Performer": "performer",
    "Lara": "lara",
    "CosformerAttention": "cosformer",
    "ProbSparse": "prob_sparse",
}
OPTIONS = {
    "wsize": "window",
    "num_landmarks": "landmarks",
    "conv_kernel_size": "kernel",
    "approx_attn_dim": "features",
}
COMPAT = ("abc", "nystrom", "performer", "lara", "cosformer")

# Where the corrected form must differ, and why.
WRONG = {
    "abc causal": "slots hold the last token only",
    "nystrom": "scores are divided by h, one scale for the whole batch",
    "nystrom padded": "padding is divided into segments",
    "performer": "constants in features and denominator",
    "performer cross": "constants in features and denominator",
    "lara padded": "padding counts in segments and in the log-sum-exp",
    "cosformer": "padded keys are attended to",
}


@pytest.fixture(scope="module")
def released():
    with np.load(FOLDER / "efficient.npz") as stored:
        return dict(stored)


def ours(name, monkeypatch, **changes):
    kind, options, pattern, _ = golden.CASES[name]
    if kind == "Performer":
        fixed = lambda self, *_, **__: jnp.asarray(golden.directions(self.features))
        monkeypatch.setattr(Performer, "projection", fixed)
    if kind == "ProbSparse":
        table = golden.sample(golden.T, 2 * math.ceil(math.log(golden.T)))
        draw = lambda self, rng, length, number: jnp.asarray(table)[:, number]
        monkeypatch.setattr(ProbSparse, "draw", draw)
    options = {OPTIONS.get(key, key): value for key, value in options.items()}
    attention = efficient.make(
        OURS[kind],
        causal=pattern.startswith("causal"),
        cross=pattern.endswith("cross"),
        **options,
        **changes,
    )
    x, context = golden.inputs(name)
    apply = lambda *args: attention.apply(*args, key_valid=golden.valid(name))
    return jax.jit(apply)(golden.params(name), x, context)


@pytest.mark.parametrize("name", [name for name in golden.CASES if name != "local padded"])
def test_released_form(released, monkeypatch, name):
    is_quirky = OURS[golden.CASES[name][0]] in COMPAT
    found = ours(name, monkeypatch, **({"compat": True} if is_quirky else {}))
    np.testing.assert_allclose(found, released[name], atol=SAME)


@pytest.mark.parametrize("name", WRONG)
def test_corrected_form_differs(released, monkeypatch, name):
    assert abs(ours(name, monkeypatch) - released[name]).max() > DIFFERENT


def test_released_window_sees_padding(released, monkeypatch):
    """It joins "outside" and "padding" by "and": what is only one of them is seen."""
    found, w = ours("local padded", monkeypatch), golden.CASES["local padded"][1]["wsize"]
    valid = golden.T - golden.PADDED
    difference = abs(found - released["local padded"]).max(axis=(0, 2))
    assert difference[w : valid - w].max() < SAME
    assert difference[:w].min() > DIFFERENT and difference[valid - w : valid].min() > DIFFERENT
