# SPDX-License-Identifier: Apache-2.0
"""Every kernel on every mask it supports against the float64 oracle of the core's own tests."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.benchmarks import turns
from attnjax.benchmarks.long_context.cases import LongCase
from attnjax.benchmarks.long_context.kernels import KERNELS, METHODS
from attnjax.benchmarks.long_context.patterns import PATTERNS, SPARSE, Setting
from attnjax.ops import chunked
from attnjax.ops.cases import Case

CORE = pathlib.Path(__file__).parents[2] / "ops/core_test.py"

QUICK = {"xla_backend_optimization_level": 0}
HERE = ("reference", "jax.nn", "chunked", "predicate", "columns")
"""Kernels that a CPU serves."""
T = 50
FEW = {
    "reference": ("variable_block_sparse",),
    "jax.nn": ("causal_blockwise",),
    "chunked": (*SPARSE, "block_causal_document", "global_sliding_window"),
    "predicate": ("share_question", "prefix_lm_document", "causal_blockwise"),
    "columns": ("share_question", "prefix_lm_causal", "full_document"),
}
"""Patterns of the default run: every program has to be compiled."""


@functools.cache
def core():
    """The module of the core's tests: its oracle and its tolerances."""
    spec = importlib.util.spec_from_file_location("core_oracle", CORE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of a few tokens."""
    path = tmp_path_factory.mktemp("lengths") / "tiny.json"
    path.write_text('{"[3,12)": 1, "[12,20)": 1}')
    return str(path)


def make_case(pattern, dtype, documents, **changes):
    setting = Setting(window=6, piece=8, distribution=documents, block=8, ratio=0.2)
    sizes = dict(b=1, t=T, n=4, k=2, h=8, direction="both") | changes
    return LongCase(pattern, dtype, setting=setting, **sizes)


def oracle(case, arrays, dout, dlse):
    like = Case("long", b=1, t=case.t, s=case.t, n=case.n, k=case.k, h=case.h, hv=case.h)
    return core().oracle(like, arrays, {"mask": case.make_mask()}, dout, dlse)


def check(name, pattern, dtype, documents):
    case = make_case(pattern, dtype, documents)
    *arrays, dout = case.arrays()
    has_lse = name != "jax.nn"
    dlse = jax.random.normal(jax.random.key(9), (1, case.n, case.t)) * has_lse
    attend = KERNELS[name](case)

    def both(*inputs):
        def call(*inputs):
            if not has_lse:
                return attend(*inputs), jnp.zeros_like(dlse)
            found = attend(*inputs, return_lse=True)
            return found.out, found.lse

        (out, lse), pull = jax.vjp(call, *inputs)
        return out, lse, *pull((dout, dlse))

    found = jax.jit(both, compiler_options=QUICK)(*arrays)
    wanted = oracle(case, arrays, dout, dlse)
    parts = dict(zip(("out", "lse", "query", "key", "value"), found, strict=True))
    if not has_lse:
        del parts["lse"]
    for part, value in parts.items():
        floor = core().ROUNDING[dtype] * wanted["terms"].get(part, 0)
        core().close(value, wanted[part], core().TOLERANCE[dtype], floor, f"{name}: {part}")
    is_empty = ~np.asarray(case.make_mask().dense_bnts(T, T)).any(axis=3)
    rows = np.broadcast_to(is_empty, (1, case.n, T)).swapaxes(1, 2)
    assert not np.asarray(parts["out"], np.float32)[rows].any()
    return is_empty.any()


def cases():
    """Every pair; in the default run few of the many programs that must be compiled."""
    found = []
    for name in HERE:
        for pattern in KERNELS[name].patterns:
            for dtype in ("float32", "bfloat16"):
                quick = dtype == "float32" and pattern in FEW[name]
                marks = () if quick else pytest.mark.slow
                found.append(pytest.param(name, pattern, dtype, marks=marks))
    return found


@pytest.mark.parametrize(("name", "pattern", "dtype"), cases())
def test_kernel_equals_the_oracle(name, pattern, dtype, documents, monkeypatch):
    # Several tiles in every direction.
    monkeypatch.setattr(chunked, "choose_tiles", lambda *_, **__: chunked.Tiles(1, 16, 24))
    has_empty_rows = check(name, pattern, dtype, documents)
    if pattern in SPARSE:
        assert has_empty_rows, "the point of a small ratio"


def test_declared_patterns():
    supported = {name: kernel.patterns for name, kernel in KERNELS.items()}
    assert set(supported["cudnn"]) == {"full", "causal", "sliding_window_causal"}
    for name in ("jax.nn", "predicate", "columns"):
        assert set(supported[name]) == set(PATTERNS) - set(SPARSE)
    for name in ("reference", "chunked", "pallas_tpu", "pallas_gpu"):
        assert set(supported[name]) == set(PATTERNS)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cudnn", {"pattern": "share_question"}, "cudnn: mask share_question, dtype float32"),
        ("cudnn", {"dtype": "bfloat16", "h": 12}, "heads of 12"),
        ("cudnn", {"dtype": "bfloat16", "h": 264}, "heads of 264"),
        ("cudnn", {"dtype": "bfloat16"}, "needs a GPU"),
        ("pallas_tpu", {}, "pallas_tpu: "),
        ("pallas_gpu", {"h": 512}, "heads of 512"),
        ("columns", {"pattern": "uniform_block_sparse"}, "mask uniform_block_sparse"),
    ],
)
def test_what_is_not_supported_is_a_status(name, changes, message, documents):
    changes = {"pattern": "causal", "dtype": "float32"} | changes
    case = make_case(documents=documents, **changes)
    row = {}
    make = lambda: turns.compiled(KERNELS[name](case), case.arrays()[:3], row)
    assert turns.prepare(make, row) is None
    assert row["status"].startswith("refused: ") and message in row["status"]


def test_scores_that_cannot_fit_are_out_of_memory():
    row = {}
    case = LongCase("full", "bfloat16", 1, 2**20, 64, 8, 128, "forward")
    assert turns.prepare(lambda: KERNELS["reference"](case), row) is None
    assert row["status"] == "out of memory"


def test_programs_that_cannot_fit_are_out_of_memory(monkeypatch):
    monkeypatch.setattr(turns.os, "sysconf", lambda name: 1000)
    row = {}
    make = lambda: turns.compiled(lambda x: x + 1, [jnp.zeros(10**6)], row)
    assert turns.prepare(make, row) is None
    assert row["status"] == "out of memory" and row["peak_bytes"] >= 8 * 10**6


def test_other_errors_are_not_hidden():
    def wrong():
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        turns.prepare(lambda: wrong, {})


def test_heads_that_devices_do_not_divide(documents):
    case = make_case("causal", "float32", documents, devices=8)
    with pytest.raises(NotImplementedError, match="4 heads over 8 ranks"):
        METHODS["ulysses"](case)
