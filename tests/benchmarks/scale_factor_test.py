# SPDX-License-Identifier: Apache-2.0
"""The scale factor: what is measured is what is printed, and both factors apart."""

import dataclasses

import pytest

from attnjax.benchmarks import scale_factor
from attnjax.benchmarks.scale_factor import SHAPES, Case, cell, grid, render, run

DIFFERENCE = 1e-5
"""Of float32 numbers of size one, summed in another order."""


def test_measures_time_in_turns(tmp_path):
    cases = grid("quick", "time/.*1x256.*forward")
    rows = run(cases, tmp_path / "results.csv", budget=0.1)
    assert [row["contestant"] for row in rows] == list(scale_factor.CONTESTANTS)
    vanilla, tiled, distributed = rows
    assert {row["status"] for row in rows} == {"ok"} and distributed["devices"] == 8
    assert distributed["plan"] == "1x2x2x2" and tiled["devices"] == 1
    assert max(row["difference"] for row in rows) < DIFFERENCE and vanilla["difference"] == 0
    assert distributed["device_bytes"] < tiled["device_bytes"]
    text = render(rows)
    for one, two in ((vanilla, tiled), (tiled, distributed), (vanilla, distributed)):
        assert f" {one['median_ms'] / two['median_ms']:.2f}x" in text.splitlines()[1]
    assert "8 virtual devices share" in text and "no published factor is reproduced" in text
    # Nothing is measured again, and what is read back prints the same.
    said = []
    again = run(cases, tmp_path / "results.csv", say=said.append)
    assert not said and render(again) == text


def test_longest_sequence(tmp_path, monkeypatch):
    """Doubled until the program of one device exceeds the limit; nothing is run."""

    def compile_nothing(name, shape, row):
        row["device_bytes"] = {
            "vanilla": shape.t**2, "tiled": 64 * shape.t, "distributed": 8 * shape.t
        }[name]  # fmt: skip

    monkeypatch.setattr(scale_factor, "_compile", compile_nothing)
    (case, names), *_ = grid("quick", "length/.*forward")
    case = dataclasses.replace(case, limit_bytes=2**20)
    rows = run([(case, names)], tmp_path / "results.csv")
    assert [row["longest"] for row in rows] == [2**10, 2**14, 2**17]
    line = render(rows).splitlines()[1].split()
    assert line[-3:] == ["16.00x", "8.00x", "128.00x"]
    monkeypatch.setattr(scale_factor, "LONGEST", 2**16)
    *_, last = scale_factor.find_longest(case, names)
    assert last["status"] == "not ended" and last["longest"] == 2**16


def test_what_does_not_fit_is_a_value(tmp_path):
    ((case, names),) = grid("quick", "vanilla/(time|length)/.*1x512.*forward")
    small = dataclasses.replace(case, limit_bytes=1000)
    (row,) = run([(small, names)], tmp_path / "results.csv")
    assert row["status"] == "over the limit" and row["median_ms"] == ""
    (row,) = scale_factor.find_longest(dataclasses.replace(small, quantity="length"), names)
    assert row["status"] == "none fits" and row["longest"] == ""
    assert "none fits" in render([row])


def test_grid():
    assert {cell("tiled", case) for case, _ in grid("quick")} == {
        f"tiled/{quantity}/full/float32/1x{t}x2x2x16/{direction}"
        for quantity, t in (("time", 256), ("time", 512), ("length", 256))
        for direction in ("forward", "both")
    }
    assert all(isinstance(case, Case) for name in SHAPES for case, _ in grid(name))
    for arguments, message in (
        (("huge",), "choose from"),
        (("quick", "["), "no regular"),
        (("quick", "nobody"), "no cell"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(*arguments)
