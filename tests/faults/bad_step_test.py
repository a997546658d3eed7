# SPDX-License-Identifier: Apache-2.0
"""Faults 12, 13 and 15: planted NaN, spikes, and a directory that belongs to another recipe."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from attnjax.errors import Diverged, Preempted, RecipeError
from attnjax.recipe import Checkpoint, Guard
from attnjax.train.checkpoint import Checkpointer
from attnjax.train.loop import run


@pytest.fixture
def recipe(linear_recipe):
    return dataclasses.replace(linear_recipe, checkpoint=Checkpoint(every=1, keep=99))


def poison(*steps):
    """Return a hook that plants NaN in one example of the batches of some steps (from 1)."""

    def plant(step, rows):
        if step + 1 in steps:
            rows["fine"][5] = np.nan

    return plant


def saved_steps(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def bad_lines(workdir):
    return [json.loads(line) for line in (workdir / "bad_steps.jsonl").read_text().splitlines()]


def assert_all_finite(workdir, state):
    """Restore every checkpoint of a run and look at every number in it."""
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    steps = saved_steps(workdir)
    assert steps
    for step in reversed(steps):
        folder = workdir / "checkpoints"
        restored, _, _, found = Checkpointer(folder, 1, 99).restore(target)
        assert found == step == max(saved_steps(workdir))
        for leaf in jax.tree.leaves((restored.params, restored.opt_state, restored.ema)):
            assert np.isfinite(leaf).all()
        (folder / str(step)).rename(folder / f"{step}.seen")


def same(a, b):
    jax.tree.map(
        np.testing.assert_array_equal,
        (a.params, a.opt_state, a.ema, a.guard),
        (b.params, b.opt_state, b.ema, b.guard),
    )


def test_planted_nan_is_skipped_and_recorded(recipe, tmp_path):
    seen = {}

    def plant(step, rows):
        seen[step + 1] = rows["index"].tolist()
        poison(4)(step, rows)

    result = run(recipe, tmp_path, on_step=plant)
    (line,) = bad_lines(tmp_path)
    assert (line["step"], line["reason"]) == (4, "loss is not finite")
    assert line["ids"] == seen[4]
    adam, _, schedule = result.state.opt_state
    assert (int(adam.count), int(schedule.count)) == (11, 11)
    assert (int(result.state.step), int(result.state.guard.count)) == (12, 11)
    # Of the steps that are kept, none is given up for one that may already be stuck.
    assert saved_steps(tmp_path) == [1, 2, 3, *range(5, 13)]
    assert_all_finite(tmp_path, result.state)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logged = {line["step"]: line for line in map(json.loads, lines)}
    assert logged[4]["train/loss"] is None and logged[4]["train/skipped"] == 1
    assert logged[4]["train/lr"] == logged[5]["train/lr"] > logged[6]["train/lr"]


def test_bad_steps_in_a_row_end_the_run_and_heal(recipe, tmp_path):
    healthy = run(recipe, tmp_path / "healthy")
    workdir = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(Diverged, match=r"step 8: .* last of 3 bad steps in a row") as caught:
            run(recipe, workdir, on_step=poison(6, 7, 8))
        assert caught.value.exit_code == 5
        assert saved_steps(workdir) == [1, 2, 3, 4, 5]
        # The repeated run replaces the lines of the first one.
        assert [line["step"] for line in bad_lines(workdir)] == [6, 7, 8]
    same(run(recipe, workdir).state, healthy.state)
    assert bad_lines(workdir) == []
    assert_all_finite(workdir, healthy.state)


def test_the_count_of_bad_steps_survives_a_restart(recipe, tmp_path):
    def stop(step, rows):
        poison(5, 6)(step, rows)
        if step + 1 == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted):
        run(recipe, tmp_path, on_step=stop)
    assert saved_steps(tmp_path) == [1, 2, 3, 4, 6]
    with pytest.raises(Diverged, match=r"step 7: .* last of 3 bad steps in a row"):
        run(recipe, tmp_path, on_step=poison(7))
    assert [line["step"] for line in bad_lines(tmp_path)] == [5, 6, 7]
    assert saved_steps(tmp_path) == [1, 2, 3, 4, 6]


def test_without_skipping_nothing_damaged_is_saved(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=6, guard=Guard(skip=False, patience=5))
    # One bad step of five would be tolerated, but here it has spoilt the state.
    with pytest.raises(
        Diverged, match=r"step 6: ema/head/bias, .*params/head/kernel not fin"
    ) as caught:
        run(recipe, tmp_path, on_step=poison(5))
    assert caught.value.exit_code == 5
    assert saved_steps(tmp_path) == [1, 2, 3, 4]
    healthy = run(recipe, tmp_path)
    assert healthy.step == 6
    assert_all_finite(tmp_path, healthy.state)


def test_spike_is_recorded_and_skipped(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=60, guard=Guard(spike_sigma=10.0))
    recipe.checkpoint = Checkpoint(every=60)

    def spike(step, rows):
        if step + 1 == 55:
            rows["fine"] *= 1e3

    result = run(recipe, tmp_path, on_step=spike)
    (line,) = bad_lines(tmp_path)
    assert (line["step"], line["reason"]) == (55, "loss is a spike")
    assert np.isfinite(line["loss"])
    assert int(result.state.opt_state[0].count) == 59


def test_guard_changes_no_bit_of_a_healthy_run(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=60, checkpoint=Checkpoint(every=60))
    states = []
    for name, guard in (("off", Guard(skip=False)), ("on", Guard(skip=True, spike_sigma=10.0))):
        states.append(run(dataclasses.replace(recipe, guard=guard), tmp_path / name).state)
        assert not (tmp_path / name / "bad_steps.jsonl").exists()
    same(*states)


def test_force_continues_with_another_recipe(recipe, tmp_path):
    run(dataclasses.replace(recipe, steps=4), tmp_path)
    changed = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr=0.5))
    before = (tmp_path / "recipe.json").read_text()
    with pytest.raises(
        RecipeError, match=r"another recipe.*optim\.lr: 0\.001 != 0\.5; steps: 4 != 12"
    ):
        run(changed, tmp_path)
    assert (tmp_path / "recipe.json").read_text() == before
    steps = []
    result = run(changed, tmp_path, resume="force", on_step=lambda step, _: steps.append(step))
    assert steps == list(range(4, 12)) and result.step == 12
    assert json.loads((tmp_path / "recipe.json").read_text())["optim"]["lr"] == 0.5
