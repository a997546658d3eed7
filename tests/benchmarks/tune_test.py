# SPDX-License-Identifier: Apache-2.0
"""The search for tiles: its candidates, its table."""

import pytest

from attnjax.benchmarks import tune
from attnjax.benchmarks.contestants import Case
from attnjax.errors import RecipeError
from attnjax.ops import tuning
from attnjax.timing import Timing

TINY = Case("causal", "float32", b=1, t=32, n=2, k=2, h=8, direction="both")
SMALL = [{"queries": 16, "keys": 16, "heads": 1}, {"queries": 32, "keys": 16, "heads": 2}]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda *_: SMALL)


@pytest.mark.parametrize("name", tuning.TILES)
def test_candidates_have_the_names_that_tables_have(name):
    found = tune.candidates(name, Case("full", "float32", 1, 2048, 8, 8, 64, "both"))
    assert len(found) > 4
    for tiles in found:
        assert sorted(tiles) == sorted(tuning.TILES[name])


def fixed(times):
    def alternate(runs, **_):
        for run in runs.values():
            run()
        return {name: Timing((times[i],) * 3) for i, name in enumerate(runs)}

    return alternate


def test_what_beats_the_rule_is_written(few, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "alternate", fixed([2e-3, 3e-3, 1e-3]))
    path, lines = tmp_path / "tuning.json", []
    rows = tune.tune([(TINY, ["chunked", "torch"])], path, say=lines.append)
    assert rows == [("chunked/causal/float32/1x32x2x2x8", 2.0, 1.0, SMALL[1])]
    (entry,) = tuning.load(path).entries
    assert dict(entry.tiles) == SMALL[1] and entry.milliseconds == 1.0
    assert not entry.is_full and len(lines) == 1
    text = tune.render(rows, path)
    assert "queries" in text and f"ATTNJAX_TUNING={path}" in text
    monkeypatch.setattr(tune, "alternate", fixed([2e-3, 2.1e-3, 1.99e-3]))
    rows = tune.tune([(TINY, ["chunked"])], path)
    assert rows[0][3] == {}
    # What was found before is kept.
    assert tuning.load(path).entries == (entry,)


def test_refusals_and_other_cells_are_left_out(few, tmp_path):
    path, lines = tmp_path / "tuning.json", []
    forward = Case("causal", "float32", 1, 32, 2, 2, 8, "forward")
    window = Case("window", "float32", 1, 32, 2, 2, 8, "both")
    cases = [(forward, ["chunked"]), (window, ["chunked"]), (TINY, ["pallas_tpu", "reference"])]
    with pytest.raises(RecipeError, match="nothing to tune"):
        tune.tune(cases, path, say=lines.append)
    assert len(lines) == 1 and "pallas_tpu" in lines[0] and "refused" in lines[0]
    assert not path.exists()


def test_another_file_is_left_alone(few, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text("{}")
    with pytest.raises(RecipeError, match="no table of tiles"):
        tune.tune([(TINY, ["chunked"])], path)
    assert path.read_text() == "{}"


def test_real_times(few, tmp_path):
    rows = tune.tune([(TINY, ["chunked"])], tmp_path / "tuning.json", budget=0.01)
    ((_, rule, best, _),) = rows
    assert 0 < best <= rule
