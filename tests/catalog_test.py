# SPDX-License-Identifier: Apache-2.0
"""The list of systems and the README's table."""

import json

import pytest

from attnjax import catalog
from attnjax.errors import RecipeError

RECORD = {
    "system": "crossvit", "holds": True, "seeds": [0, 1, 2],
    "mean": {"cross": 0.9951, "none": None},
}  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    monkeypatch.setattr(catalog, "results_file", lambda: path)
    return path


def crossvit():
    return next(row for row in catalog.rows() if row.slug == "crossvit")


def test_row_without_measurement(results):
    row = crossvit()
    assert row.kind == "model"
    assert len(row.presets) == 11
    assert "configs/crossvit/digits.py" in row.recipes
    assert "configs/crossvit/claim.py" not in row.recipes
    assert "claim not measured yet" in row.status
    assert row.result == ""


def test_newest_record_counts(results):
    older = {**RECORD, "holds": False}
    results.write_text("".join(json.dumps(r) + "\n" for r in (older, RECORD)))
    row = crossvit()
    assert "claim reproduced" in row.status
    assert row.result == "cross 0.995 (mean of 3 seeds)"
    results.write_text(json.dumps(older) + "\n")
    assert "claim not reproduced" in crossvit().status


@pytest.mark.parametrize("line", ["{", "[]", '{"system": "nobody"}', '{"claim": "x"}'])
def test_bad_line_names_file_and_line(results, line):
    results.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(RecipeError, match=r"results\.jsonl:2"):
        catalog.rows()


def test_readme_table_is_replaced_between_its_markers(results):
    text = f"before\n{catalog.README_START}\nstale text\n{catalog.README_END}\nafter\n"
    filled = catalog.fill_readme(text)
    assert "stale text" not in filled
    assert filled.startswith("before\n") and filled.endswith("after\n")
    assert "`crossvit`" in filled
    assert catalog.fill_readme(filled) == filled
    with pytest.raises(RecipeError, match="markers"):
        catalog.fill_readme("no markers")
