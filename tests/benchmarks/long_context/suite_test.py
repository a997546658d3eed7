# SPDX-License-Identifier: Apache-2.0
"""The suite: grids, cells measured once, tables in the paper's columns, pictures."""

import csv
import types

import jax
import numpy as np
import pytest

from attnjax.benchmarks.long_context import layouts, metrics, suite
from attnjax.benchmarks.long_context.cases import LongCase
from attnjax.benchmarks.long_context.grid import PRESETS, Grid, cell, grid, make_grid
from attnjax.benchmarks.long_context.kernels import KERNELS, METHODS
from attnjax.benchmarks.long_context.patterns import PATTERNS, RANDOM
from attnjax.benchmarks.turns import Protocol
from attnjax.ops import attention
from attnjax.parallel import undispatch

FAST = Protocol(rounds=3, warmup=0, budget=0.01)
TINY = Grid(
    patterns=("causal", "causal_document"),
    kernels=("reference", "cudnn", "torch"),
    lengths=(32,),
    heads=((2, 1, 8),),
    dtypes=("float32",),
    methods=("ring", "ulysses", "hybrid"),
    devices=(4,),
    device_patterns=("causal_document",),
    tokens_per_device=8,
    draws=2,
    protocol=FAST,
)


def rows_of(positions, length):
    return types.SimpleNamespace(positions=np.asarray(positions, np.int32), length=length)


def refuse(*arguments):
    raise ValueError("planted refusal")


def zigzag(t, n):
    chunks = np.arange(t).reshape(2 * n, -1)
    return rows_of(np.concatenate([chunks[:n], chunks[::-1][:n]], axis=1), t)


LAYOUTS = types.SimpleNamespace(
    contiguous=lambda t, n: rows_of(np.arange(t).reshape(n, -1), t),
    zigzag=zigzag,
    document_zigzag=refuse,
    hybrid=refuse,
    balanced=lambda mask, t, n, chunk: zigzag(t, n),
)


@pytest.fixture
def fake(monkeypatch):
    """Stand-ins for what takes long to compile, and for layouts; returns the calls."""
    calls, real = [], layouts.attend

    def attend(method, mask, t, heads, devices):
        if method == "ulysses":
            return real(method, mask, t, heads, devices)
        layouts.context_mesh(devices)
        calls.append((method, devices))
        if method == "hybrid":
            raise NotImplementedError("hybrid: no such mask")
        return lambda query, key, value: attention(query, key, value, mask=mask)

    monkeypatch.setattr(layouts, "attend", attend)
    monkeypatch.setattr(layouts, "layout", LAYOUTS)
    return calls


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tiny_cases():
    return [(case, list(names)) for case, names in TINY.cases()]


def test_whole_run_and_resumption(fake, tmp_path, monkeypatch):
    path, lines = tmp_path / "results.csv", []
    # What is missing of an interrupted run is measured, and nothing twice.
    suite.run(tiny_cases()[:2], path, budget=0.01, say=lines.append)
    rows = suite.run(tiny_cases(), path, budget=0.01, say=lines.append)
    names = set(suite.names(tiny_cases()))
    assert [suite.row_cell(row) for row in rows] == [suite.row_cell(row) for row in read(path)]
    assert len(rows) == len(names) == len({suite.row_cell(row) for row in rows})
    assert {suite.row_cell(row) for row in rows} == names
    status = {suite.row_cell(row): row["status"] for row in rows}
    device = "causal_document:pile:mixture/float32/32x2x1x8/forward/1"
    assert status["reference@1/causal/float32/32x2x1x8/forward/0"] == "ok"
    assert "dtype float32" in status["cudnn@1/causal/float32/32x2x1x8/forward/0"]
    assert "no mask" in status["torch@1/causal_document:pile/float32/32x2x1x8/forward/0"] or (
        "not installed" in status["torch@1/causal_document:pile/float32/32x2x1x8/forward/0"]
    )
    assert status[f"ring@4/{device}"] == "ok"
    assert "2 heads over 4 ranks, which do not divide them" in status[f"ulysses@4/{device}"]
    assert status[f"hybrid@4/{device}"] == "refused: hybrid: no such mask"
    assert set(fake) == {("ring", 4), ("hybrid", 4)}
    (ring,) = [r for r in rows if suite.row_cell(r) == f"ring@4/{device}"]
    assert (int(ring["ulysses"]), int(ring["ring"])) == (1, 4)
    case = next(c for c, _ in tiny_cases() if c.devices == 4 and c.draw == 1)
    expected = case.flops / 4 / float(ring["median_ms"]) * 1e-9
    assert float(ring["tflops"]) == pytest.approx(expected, abs=1e-6)
    assert int(ring["peak_bytes"]) > 0
    # A third run measures nothing and leaves every table as it is.
    before = {p: p.read_text() for p in tmp_path.rglob("*.csv")}
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(suite, "_balance_of", lambda *_: pytest.fail("planned again"))
    suite.run(tiny_cases(), path, budget=0.01)
    assert {p: p.read_text() for p in tmp_path.rglob("*.csv")} == before
    check_summary(tmp_path, rows)
    check_balance(tmp_path)
    text = suite.render(rows)
    assert "@4 causal_document:pile:mixture/float32/32x2x1x8/forward" in text
    assert "planted" not in text and "hybrid: no such mask" in text
    files = {path.name for path in suite.draw(rows, tmp_path / "results.png")}
    assert files == {"speed_forward.png", "balance.png"}
    for name in files:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def check_summary(folder, rows):
    found = {p.name: read(p) for p in (folder / "summary").iterdir()}
    assert set(found) == {"32x2x1x8-float32.csv", "8x2x1x8-float32.csv"}
    for table in found.values():
        assert tuple(table[0]) == (
            "baseline", "masktype", "world_size", "wd", "ulysses", "ring", "mean_tflops",
            "mean_peak_mems",
        )  # fmt: skip
        keys = [tuple(row.values())[:6] for row in table]
        assert len(keys) == len(set(keys))
    by_key = {tuple(r.values())[:6]: r for r in found["8x2x1x8-float32.csv"]}
    mask = "causal_document:pile:mixture"
    ring = by_key["ring", mask, "4", "fwd", "1", "4"]
    draws = [r for r in rows if r["contestant"] == "ring"]
    assert len(draws) == 2
    mean = np.mean([float(r["tflops"]) for r in draws])
    assert float(ring["mean_tflops"]) == pytest.approx(mean, rel=1e-5)
    refused = by_key["ulysses", mask, "4", "fwd", "4", "1"]
    assert float(refused["mean_tflops"]) == float(refused["mean_peak_mems"]) == -1


def check_balance(folder):
    rows = read(folder / "balance.csv")
    assert len(rows) == len(layouts.PLACEMENTS) * 2
    status = {row["placement"]: row["status"] for row in rows}
    assert status["hybrid"] == "refused: planted refusal"
    assert status["contiguous"] == status["zigzag"] == status["balanced"] == "ok"
    for row in rows:
        if row["status"] == "ok":
            assert 1 <= float(row["max_over_mean"]) <= 4


def test_out_of_memory_has_its_value(tmp_path):
    row = {
        "contestant": "reference", "mask": "full", "devices": 1, "t": 64, "n": 2, "k": 2, "h": 8,
        "dtype": "float32", "direction": "both", "draw": 0, "ulysses": 1, "ring": 1,
        "status": "out of memory", "tflops": "", "peak_bytes": "",
    }  # fmt: skip
    (path,) = suite.write_summary([row], tmp_path)
    (found,) = read(path)
    assert (found["wd"], float(found["mean_tflops"])) == ("1f1b", metrics.MEMORY_VALUE)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        suite.run(tiny_cases(), path)


def test_too_many_devices_are_a_refusal(fake, tmp_path):
    case = LongCase("full", "float32", 1, 96, 2, 1, 8, "forward", devices=96, protocol=FAST)
    (row,) = suite.run([(case, ["ring"])], tmp_path / "results.csv")
    assert row["status"] == "refused: 96 devices are needed, and 8 are there"


def test_backward_alone_and_both(fake, tmp_path):
    cases = [
        (LongCase("causal", "float32", 1, 32, 2, 1, 8, d, protocol=FAST), ["chunked"])
        for d in ("backward", "both")
    ]
    rows = suite.run(cases, tmp_path / "results.csv", budget=0.01)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert cases[0][0].flops * 3.5 == cases[1][0].flops * 2.5


def test_methods_run_on_arrays_where_their_plan_has_them():
    case = LongCase("causal_document", "float32", 1, 640, 2, 1, 8, "forward", devices=4)
    *arrays, _ = case.arrays()
    for array in arrays:
        assert {s.data.shape[1] for s in array.addressable_shards} == {160}
    attend = METHODS["balanced"](case)
    placed = attend.place(arrays)
    assert {x.shape[1] for x in placed} == {attend.plan.layout.ranks * attend.plan.layout.size}
    out = undispatch(jax.jit(attend)(*placed), attend.plan.layout, mesh=attend.mesh)
    wanted = attention(*arrays, mask=case.make_mask())
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_grids_name_what_exists(name):
    made = make_grid(name)
    assert set(made.kernels) <= {*KERNELS, "torch"} and set(made.methods) <= set(METHODS)
    assert set(made.patterns) | set(made.device_patterns) <= set(PATTERNS)
    cells = [cell(contestant, case) for case, names in made.cases() for contestant in names]
    assert len(cells) == len(set(cells)) > 50


def test_grids_of_the_paper():
    made = make_grid("kernels")
    assert [x // 1024 for x in made.lengths] == [1, 2, 4, 8, 16, 24, 32, 40, 48]
    assert made.heads == ((64, 8, 128), (64, 64, 128)) and made.window == 1024
    cases = list(make_grid("distributed").cases())
    assert {case.t // case.devices for case, _ in cases} == {8192}
    documents = [c for c, _ in cases if c.mask in RANDOM and c.devices == 8]
    assert len(documents) == 2 * 3 * 30
    assert {c.setting.distribution for c in documents} == {"pile:mixture"}


def test_choice_of_cells_and_documents(tmp_path):
    some = grid("quick", "^chunked@1/causal/")
    assert [names for _, names in some] == [["chunked"]]
    path = tmp_path / "prolong.json"
    path.write_text('{"[1,9)": 1}')
    (case, _), *_ = grid(f"quick:{path}", "ring@8/causal_document")
    assert case.setting.distribution == f"{path}:mixture"
    for arguments, message in (
        (("hug",), "choose from"),
        (("quick", "nobody"), "matches no cell such as"),
        (("quick", "("), "no regular expression"),
        (("quick:pyle",), "distribution 'pyle'"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(*arguments)


def test_same_draws_for_all_contestants():
    one, two = (
        LongCase("causal_document", "float32", 1, 4096, 2, 1, 8, "forward", draw=d) for d in (0, 1)
    )
    assert one.drawn is one.drawn and one.drawn.lengths != two.drawn.lengths
    other = LongCase("share_question", "bfloat16", 1, 4096, 2, 1, 8, "both")
    assert other.drawn.lengths == one.drawn.lengths


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 12, 96])
def test_degrees_multiply_to_the_devices(devices):
    for method in layouts.METHODS:
        inner, ring = layouts.degrees(method, devices, 64)
        assert inner * ring == devices
    assert layouts.degrees("usp", 96, 64) == (8, 12)
    assert layouts.degrees("double_ring", 96, 4) == (4, 24)


def test_unknown_placement(fake):
    with pytest.raises(ValueError, match="placement 'zigzg'"):
        layouts.place("zigzg", None, 4)
