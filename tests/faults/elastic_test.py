# SPDX-License-Identifier: Apache-2.0
"""Fault 10: a run moves from eight devices to four to one; see `processes_test` for processes."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from attnjax import recipe as recipe_lib
from attnjax.errors import Preempted
from attnjax.parallel import make_mesh
from attnjax.recipe import Mesh
from attnjax.train.checkpoint import Checkpointer
from attnjax.train.integrity import is_key
from attnjax.train.loop import run
from attnjax.train.program import build

LOSS_TOLERANCE = 1e-6
"""Relative; float32, where only the order of sums differs between meshes."""

MESHES = {8: Mesh(data=2, fsdp=2, model=2), 4: Mesh(data=2, fsdp=2), 1: Mesh()}


def train(recipe, workdir, devices, until, monkeypatch):
    """Run on some devices up to a step; return the example ids of every step it took."""
    monkeypatch.setattr(
        "attnjax.train.loop.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:devices])
    )
    seen = {}

    def watch(step, rows):
        seen[step + 1] = rows["index"].tolist()
        if step + 1 == until < recipe.steps:
            signal.raise_signal(signal.SIGTERM)

    recipe = dataclasses.replace(recipe, mesh=MESHES[devices])
    try:
        run(recipe, workdir, on_step=watch)
    except Preempted:
        assert until < recipe.steps
    return seen


def restore(recipe, workdir, devices):
    mesh = make_mesh(dataclasses.asdict(MESHES[devices]), jax.devices()[:devices])
    program = build(recipe, mesh)
    with jax.set_mesh(mesh):
        state, *_ = Checkpointer(workdir / "checkpoints", 1, 9).restore(program.state)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), state)


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def move(recipe, folder, monkeypatch):
    """Run 8 -> 4 -> 1 devices; check it against one device all the time."""
    whole = train(recipe, folder / "whole", 1, recipe.steps, monkeypatch)
    seen = {}
    for devices, until in ((8, 4), (4, 8), (1, recipe.steps)):
        seen |= train(recipe, folder / "parts", devices, until, monkeypatch)
        assert len(seen) == until
        states = [restore(recipe, folder / "parts", count) for count in MESHES]
        for other in states[1:]:
            jax.tree.map(np.testing.assert_array_equal, states[0], other)
    assert seen == whole
    np.testing.assert_allclose(
        losses(folder / "parts"), losses(folder / "whole"), rtol=LOSS_TOLERANCE
    )


def test_linear_model_moves(linear_recipe, tmp_path, monkeypatch):
    move(linear_recipe, tmp_path, monkeypatch)


@pytest.mark.slow
def test_crossvit_moves(tmp_path, monkeypatch):
    move(recipe_lib.load("tests/faults/tiny.py"), tmp_path, monkeypatch)
