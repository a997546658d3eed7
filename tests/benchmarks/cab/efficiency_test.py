# SPDX-License-Identifier: Apache-2.0
"""Efficiency lengths of the published sheet, fits, a small series end to end."""

import math

import numpy as np
import pytest

from attnjax.benchmarks.cab import efficiency
from attnjax.benchmarks.cab.efficiency import LENGTHS, SHEET


def test_published_sheet_gives_the_published_lengths():
    memory, time = SHEET["memory_mb"], SHEET["time_ms"]
    length, r2 = efficiency.efficiency_length(LENGTHS, memory["softmax"], memory["abc"])
    assert length == pytest.approx(69.51, abs=0.005) and round(length) == 70 and r2 > 0.999
    length, _ = efficiency.efficiency_length(LENGTHS, time["softmax"], time["abc"], skip=1)
    assert length == pytest.approx(1877.26, abs=0.005)


def test_fits_recover_what_made_the_costs():
    lengths = np.array([1024, 2048, 4096, 32_768])
    parabola = efficiency.fit(lengths, 3e-6 * lengths**2 + 0.5 * lengths + 7, 2)
    np.testing.assert_allclose(parabola.coefficients, (3e-6, 0.5, 7), rtol=1e-6)
    assert parabola.r2 == pytest.approx(1)
    assert efficiency.fit(range(1, 9), np.arange(1.0, 9) ** 2, 1).r2 < 0.96
    softmax, line = 1e-3 * lengths**2.0, 4.0 * lengths + 5
    crossing, r2 = efficiency.efficiency_length(lengths, softmax, line)
    assert 1e-3 * crossing**2 == pytest.approx(4 * crossing + 5) and r2 == pytest.approx(1)
    assert math.isnan(efficiency.efficiency_length(lengths, -softmax, line)[0])
    with pytest.raises(ValueError, match="degree 2 does not fit"):
        efficiency.fit((1, 2), (1.0, 2.0), 2)


def test_the_length_from_which_a_method_stays_faster():
    lengths, baseline = (1024, 2048, 4096), (1.0, 4.0, 16.0)
    for times, expected in (
        ((0.5, 1.0, 2.0), (0, 1024)),
        ((2.0, 4.0, 8.0), (2048, 4096)),
        ((0.5, 5.0, 8.0), (2048, 4096)),
        ((2.0, 8.0, 32.0), (4096, math.inf)),
    ):
        assert efficiency.overtakes(lengths, baseline, times) == expected


def test_a_series_is_measured_once(tmp_path):
    series = efficiency.grid("ladder_quick", "^(softmax|local)/causal_self/")
    assert [cells[0].attention for cells in series] == ["local", "softmax"]
    path, said = tmp_path / "results.csv", []
    rows = efficiency.run(series, path, budget=0.01, say=said.append)
    assert len(rows) == 6 and len(said) == 2
    assert all(row["status"] == "ok" and float(row["median_ms"]) > 0 for row in rows)
    again = efficiency.run(series, path, say=lambda line: pytest.fail(line))
    assert [efficiency.row_name(row) for row in again] == [efficiency.row_name(r) for r in rows]
    found = {record["attention"]: record for record in efficiency.summarise(again)}
    assert math.isnan(found["softmax"]["crossover"]) and found["local"]["memory_r2"] <= 1
    assert "local causal_self" in efficiency.render(again)
    assert efficiency.draw(again, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_grids_cover_the_support_table():
    names = {(cells[0].attention, cells[0].pattern) for cells in efficiency.grid("ladder")}
    assert ("performer", "causal_cross") in names and ("lara", "causal_self") not in names
    assert efficiency.grid("efficiency")[0][-1].length == 8192
    with pytest.raises(ValueError, match="grid 'huge' is unknown"):
        efficiency.grid("huge")
    with pytest.raises(ValueError, match="matches no cell"):
        efficiency.grid("ladder", "nothing")
