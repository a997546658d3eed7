# SPDX-License-Identifier: Apache-2.0
"""The attention benchmark: its grid, its numbers, its file, its picture."""

import csv

import pytest

from attnjax.benchmarks import attention as suite
from attnjax.benchmarks.contestants import CONTESTANTS, MASKS, Case
from attnjax.benchmarks.figures import draw_attention

TINY = Case("causal", "float32", b=1, t=32, n=2, k=2, h=8, direction="both")


def test_grid_is_filtered_by_cell_names():
    everything = suite.grid("quick")
    cells = {suite.cell(name, case) for case, names in everything for name in names}
    assert len(cells) == 2 * len(MASKS) * 2 * 2 * (len(CONTESTANTS) + 1)
    some = suite.grid("quick", r"^(chunked|torch)/causal/float32/.*/forward")
    assert [names for _, names in some] == [["chunked", "torch"]] * 2
    with pytest.raises(ValueError, match="matches no cell"):
        suite.grid("quick", "nothing")
    with pytest.raises(ValueError, match="no regular expression"):
        suite.grid("quick", "(")
    with pytest.raises(ValueError, match="choose from"):
        suite.grid("huge")


def test_growth_over_lengths():
    row = {name: 1 for name in suite.FIELDS}
    row |= {"contestant": "chunked", "mask": "window_256", "dtype": "float32"}
    row |= {"direction": "both", "status": "ok"}
    points = [(1024, 10.0, 100), (2048, 20.0, 210), (8192, 80.0, 840)]
    rows = [row | {"t": t, "median_ms": ms, "temporary_bytes": size} for t, ms, size in points]
    assert suite.growth(rows[:2]) == []
    assert suite.growth([*rows, row | {"status": "out of memory"}]) == [
        "  chunked/window_256/float32/1x1x1x1/both from 1024 to 8192: R^2 of time over length "
        "1.0000; by doubling at most time x 2.00, memory x 2.10"
    ]
    bent = [rows[0], rows[1], rows[2] | {"median_ms": 320.0}]
    assert "time x 4.00" in suite.growth(bent)[0] and "1.0000" not in suite.growth(bent)[0]
    ladder = suite.grid("ladder", "chunked/window_256/float32/.*/forward")
    assert [case.t for case, _ in ladder] == [1024, 2048, 4096, 8192, 16384]


def test_operations_follow_the_area():
    assert TINY.area == 32 * 33 // 2
    assert TINY.flops == 4 * TINY.area * 2 * 8 * 3.5
    for name in MASKS:
        assert 0 < Case(name, "float32", 1, 256, 1, 1, 8, "forward").area <= 256**2


@pytest.fixture
def small(monkeypatch):
    chosen = {name: CONTESTANTS[name] for name in ("reference", "jax.nn", "pallas_tpu")}
    monkeypatch.setattr(suite, "CONTESTANTS", chosen)
    return [(TINY, ["reference", "jax.nn", "pallas_tpu"])]


def test_cells_are_measured_once_and_refusals_are_values(small, tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    lines = []
    rows = suite.run(small[:1], path, budget=0.01, say=lines.append)
    found = {row["contestant"]: row for row in rows}
    assert found["reference"]["status"] == found["jax.nn"]["status"] == "ok"
    assert found["pallas_tpu"]["status"].startswith("refused: ")
    assert found["reference"]["low_ms"] <= found["reference"]["median_ms"]
    assert len(lines) == 1
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("measured again"))
    again = suite.run(small, path, budget=0.01)
    assert [suite.row_cell(row) for row in again] == [suite.row_cell(row) for row in rows]
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    text = suite.render(again)
    assert "refused" in text and "causal/float32/1x32x2x2x8/both" in text
    assert draw_attention(again, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_foreign_file_is_refused(small, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        suite.run(small, path)
    assert path.read_text() == "a,b\n1,2\n"


def test_nothing_to_draw(tmp_path):
    assert not draw_attention([], tmp_path / "x.png")
