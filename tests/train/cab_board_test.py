# SPDX-License-Identifier: Apache-2.0
"""CAB's leaderboard: which cells there are, resuming, indices, what is written and drawn."""

import csv
import json
import math
import types

import numpy as np
import pytest

from attnjax import recipe as recipe_lib
from attnjax.errors import Diverged
from attnjax.ops.efficient import ATTENTIONS, PATTERNS
from attnjax.train import cab_board as board


def test_cells_are_those_of_the_support_table():
    found = {cell.name for cell in board.grid("quick")}
    for task in board.TASKS:
        for name, family in ATTENTIONS.items():
            wanted = task.pattern in family.patterns
            assert (f"{task.pattern}/{task.name}/{name}" in found) == wanted
        assert f"{task.pattern}/{task.name}/none" in found
    assert {task.pattern for task in board.TASKS} == set(PATTERNS)
    assert board.names(board.grid("quick", "recall/(local|s4d)")) == [
        "causal_self/recall/local",
        "causal_self/recall/s4d",
    ]


def test_costs_are_a_grid_of_their_own():
    cases = board.grid("ladder_quick", "abc/causal_self")
    assert board.names(cases) == [f"abc/causal_self/{n}/forward" for n in (256, 512, 1024)]


@pytest.mark.parametrize(
    ("name", "only", "message"),
    [("quik", "", "choose from.*quick.*ladder"), ("quick", "nobody", "no cell such as")],
)
def test_refusals(name, only, message):
    with pytest.raises(ValueError, match=message):
        board.grid(name, only)


@pytest.mark.parametrize("scale", board.SCALES)
def test_every_recipe_is_valid_and_measures_its_metrics(scale):
    for cell in board.grid(scale):
        recipe = cell.recipe()
        assert recipe.model[cell.task.field]["name"] == cell.attention
        assert {name.partition("/")[0] for name in cell.task.metrics} <= set(recipe.evals)


@pytest.fixture
def fake(monkeypatch):
    """Replace training: metrics depend on the attention's name; ProbSparse diverges."""
    trained = []

    def train(recipe, workdir):
        field = next(f for f in ("cross_attention", "attention") if f in recipe.model)
        name = recipe.model[field]["name"]
        trained.append(name)
        if name == "prob_sparse":
            raise Diverged("planted")
        value = 1.0 + len(name)
        metrics = {m: value for task in board.TASKS for m in task.metrics}
        metrics |= {f"length_{n}/perplexity": 2 * value for n in board.LANGUAGE_LENGTHS}
        size = 200 if name == "s4d" else 100
        state = types.SimpleNamespace(params={"x": np.zeros(size)})
        return types.SimpleNamespace(metrics=metrics, state=state)

    monkeypatch.setattr(board, "train", train)
    return trained


def test_cells_are_trained_once_and_the_board_follows(fake, tmp_path, monkeypatch):
    cases, path, lines = board.grid("quick", "self/(recall|language|permutation)"), None, []
    path = tmp_path / "results.csv"
    records = board.run(cases[:5], path, say=lines.append)
    assert len(fake) == len(lines) == 5
    records = board.run(cases, path)
    assert len(fake) == len(cases), "what the folder held was not trained again"
    board.run(cases, path)
    assert len(fake) == len(cases)
    monkeypatch.setitem(board.SCALES["quick"], "recall", {"steps": 299})
    board.run(board.grid("quick", "recall/local"), path)
    assert len(fake) == len(cases) + 1, "another recipe is another cell"
    stored = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(stored) == len(cases) + 1

    found = {(s.pattern, s.attention): s for s in board.standings(records)}
    causal = [s for s in board.standings(records) if s.pattern == "causal_self"]
    sizes = {"abc": 4, "local": 6, "long_short": 11, "s4d": 4, "softmax": 8}
    values = np.array(list(sizes.values()), float)
    z = (4 - values.mean()) / values.std(ddof=1)
    parts = found["causal_self", "abc"].index.tasks
    assert parts["recall"] == pytest.approx(z) and parts["language"] == pytest.approx(-z)
    control = (5 - values.mean()) / values.std(ddof=1)
    assert found["causal_self", "none"].index.tasks["recall"] == pytest.approx(control)
    assert all(s.index.total == pytest.approx(0, abs=1e-9) for s in causal)
    assert ("noncausal_self", "prob_sparse") not in found

    text = board.render(records)
    for part in (
        "### causal self",
        "benefit of attention",
        "correlation of patterns",
        "prob_sparse: diverged",
        "2.00 times those",
        "other lengths than 128",
    ):
        assert part in text
    assert (tmp_path / "leaderboard.md").read_text().startswith("### ")
    board.write(records, path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert {"pattern", "attention", "quantity", "value"} == set(rows[0])
    assert any(r["quantity"] == "index/recall" and r["attention"] == "s4d" for r in rows)
    assert board.draw(records, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_board_of_one_attention_has_no_index(fake, tmp_path):
    records = board.run(board.grid("quick", "recall/local"), tmp_path / "results.csv")
    (standing,) = board.standings(records)
    assert math.isnan(standing.index.total) and standing.values == {"recall/test/accuracy": 6.0}
    assert "| local | - | 6.000 |" in board.render(records)
    assert not board.draw(records, tmp_path / "results.png")


def test_a_tiny_cell_really_trains(tmp_path, monkeypatch):
    def load(config):
        recipe = recipe_lib.load(config)
        recipe.model |= {"width": 16, "depth": 1, "num_heads": 2, "hidden": 16}
        recipe.optim.warmup, recipe.batch = 1, 8
        recipe.evals["test"].data.source["size"] = 16
        return recipe

    monkeypatch.setattr(board.recipe_lib, "load", load)
    monkeypatch.setitem(board.SCALES["quick"]["permutation"], "steps", 2)
    path = tmp_path / "results.csv"
    (record,) = board.run(board.grid("quick", "permutation/local"), path)
    assert record["status"] == "ok" and 0 <= record["metrics"]["test/accuracy"] <= 1
    assert record["parameters"] > 0 and record["steps"] == 2
    (again,) = board.run(board.grid("quick", "permutation/local"), path)
    assert again == record
