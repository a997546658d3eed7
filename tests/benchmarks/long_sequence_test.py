# SPDX-License-Identifier: Apache-2.0
"""The benchmark of mixers: its grid, its rows, what becomes of cells that do not fit."""

import csv

import jax
import pytest

from attnjax.benchmarks import long_sequence as suite
from attnjax.benchmarks.long_sequence import Cell
from attnjax.ops import mixers


def test_grid_covers_every_family_and_is_filtered():
    cells = suite.grid("long")
    assert len(cells) == len(suite.CONTESTANTS) * 2 * 11
    assert {length for length in suite.LENGTHS["long"]} == {2**i for i in range(10, 21)}
    assert {name for name, _ in suite.CONTESTANTS.values()} == set(mixers.MIXERS)
    for name, options in suite.CONTESTANTS.values():
        mixers.make(name, **options)
    some = suite.grid("quick", "^window/.*/forward")
    assert suite.names(some) == [f"window/{2**i}/forward" for i in range(8, 12)]
    with pytest.raises(ValueError, match="choose from"):
        suite.grid("huge")
    with pytest.raises(ValueError, match="matches no cell such as 'softmax/256/forward'"):
        suite.grid("quick", "nobody")
    with pytest.raises(ValueError, match="no regular expression"):
        suite.grid("quick", "(")


def test_cells_are_measured_once_and_outcomes_are_values(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    cells = [Cell("fnet", 32, "both"), Cell("gaussian_process", 4096, "forward")]
    lines = []
    rows = suite.run(cells, path, budget=60, say=lines.append)
    assert rows[0]["status"] == "ok"
    assert rows[0]["low_ms"] <= rows[0]["median_ms"] <= rows[0]["high_ms"]
    assert rows[0]["rounds"] == 10 and rows[0]["gflops"] > 0 and rows[0]["temporary_bytes"] > 0
    assert rows[1]["status"].startswith("refused: the Gaussian process is a cubic reference")
    assert len(lines) == 2
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("measured again"))
    again = suite.run(cells, path)
    assert [suite.row_name(row) for row in again] == suite.names(cells)
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert suite.draw(again, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "fnet both" in suite.render(again) and "refused" in suite.render(again)


def test_out_of_memory_is_a_value_and_ends_the_series(tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(suite, "_compile", exhausted)
    cells = [Cell("fnet", length, "forward") for length in (16, 32)]
    rows = suite.run(cells, tmp_path / "caught.csv")
    assert [row["status"] for row in rows] == ["out of memory", "out of memory at 16"]
    assert "OOM" in suite.render(rows)

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(suite, "_compile", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        suite.run(cells, tmp_path / "broken.csv")


def test_what_cannot_fit_is_not_started(tmp_path, monkeypatch):
    assert suite.available_bytes() > 2**20
    monkeypatch.setattr(suite, "available_bytes", lambda: 1000)
    row = suite.measure(Cell("fnet", 64, "forward"), budget=60)
    assert row["status"] == "out of memory" and row["temporary_bytes"] != ""


def test_slow_cells_end_their_series(tmp_path):
    cells = [Cell("fnet", length, "forward") for length in (16, 32)]
    rows = suite.run(cells, tmp_path / "slow.csv", budget=0.0)
    assert rows[0]["status"].startswith("slow: ") and rows[1]["status"].endswith("at 16")


def test_nothing_to_draw(tmp_path):
    assert not suite.draw([], tmp_path / "x.png")
