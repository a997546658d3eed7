# SPDX-License-Identifier: Apache-2.0
"""Sweeps over context: what is changed, what is recorded, what is trained again."""

import json
import types

import pytest

from attnjax import recipe as recipe_lib
from attnjax.errors import Diverged, RecipeError
from attnjax.train import context_sweep as sweep

NEEDLE = "configs/unified_long_sequence/needle.py"


def needle():
    return recipe_lib.load(NEEDLE)


@pytest.fixture
def fake(monkeypatch):
    """Replace training and timing: the score is the context / 100; 32 diverges."""
    trained = []

    def train(recipe, workdir):
        context = recipe.model["length"]
        trained.append(context)
        if context == 32:
            raise Diverged("planted")
        return types.SimpleNamespace(metrics={"test/accuracy": context / 100})

    speed = {"step": {"ours": {"median": 0.5}}, "temporary_bytes": {"step": 2**20},
             "parameters": 7, "device": "cpu"}  # fmt: skip
    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr(sweep, "measure", lambda *_, **__: speed)
    return trained


def test_context_changes_model_and_sources_alike():
    changed = sweep.with_context(needle(), 16)
    assert changed.model["length"] == 16
    assert changed.data.source["context"] == changed.evals["test"].data.source["context"] == 16
    assert changed.data.source["length"] == 64
    text = sweep.with_context(recipe_lib.load("configs/unified_long_sequence/text_bytes.py"), 32)
    assert text.data.source["length"] == text.model["length"] == 32
    with pytest.raises(RecipeError, match="'digit_sequences' takes neither"):
        sweep.with_context(recipe_lib.load("configs/unified_long_sequence/smoke.py"), 16)
    with pytest.raises(RecipeError, match="model 'crossvit' has no length"):
        sweep.with_context(recipe_lib.load("configs/crossvit/smoke.py"), 16)


def test_records_gain_and_resume(fake, tmp_path):
    path, lines = tmp_path / "context.jsonl", []
    records = sweep.run(needle(), (8, 16, 64), path, say=lines.append)
    assert [r["score"] for r in records] == [0.08, 0.16, 0.64]
    assert sweep.gain(records) == pytest.approx(0.56)
    assert fake == [8, 16, 64] and len(lines) == 3
    again = sweep.run(needle(), (8, 16, 32, 64), path)
    assert fake == [8, 16, 64, 32] and again[2]["score"] is None
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4
    text = sweep.render(again)
    assert "diverged" in text and "gain from context: +0.5600" in text
    sweep.draw(again, tmp_path / "context.png")
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")
    other = needle()
    other.steps += 1
    sweep.run(other, (8,), path)
    assert fake[-1] == 8, "another recipe is trained anew"


def test_wrong_sweeps_are_refused(fake, tmp_path):
    recipe = needle()
    with pytest.raises(RecipeError, match="did you mean 'quick'"):
        sweep.run(recipe, "quik", tmp_path / "x")
    recipe.checkpoint.best = ""
    with pytest.raises(RecipeError, match=r"checkpoint.best is empty"):
        sweep.run(recipe, (8,), tmp_path / "x")
    assert fake == []
