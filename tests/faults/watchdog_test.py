# SPDX-License-Identifier: Apache-2.0
"""Fault 21 in the loop: compiling may take its time, a step or a loader may not."""

import dataclasses
import time

import pytest

from attnjax.recipe import Data, Evaluation
from attnjax.train import loop
from attnjax.train.guards import Watchdog
from attnjax.train.program import build

TIMEOUT = 4.0
LONG = 2.5 * TIMEOUT

pytestmark = pytest.mark.slow


@pytest.fixture
def alarms(monkeypatch):
    """Let the watchdog note when it would end the process."""
    noted = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, silent: noted.append(silent))
    return noted


def slow_first(function):
    """Return the function with a first call that takes long, as one that compiles does."""
    calls = []

    def call(*arguments):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(LONG)
        return function(*arguments)

    return call


def test_compilation_raises_no_alarm(linear_recipe, tmp_path, monkeypatch, alarms):
    def slow_build(recipe, mesh):
        program = build(recipe, mesh)
        return dataclasses.replace(
            program, step=slow_first(program.step), evaluate=slow_first(program.evaluate)
        )

    monkeypatch.setattr(loop, "build", slow_build)
    source = {"name": "information_exchange", "split": "test", "size": 40}
    linear_recipe.evals = {"test": Evaluation(data=Data(source=source), every=4)}
    result = loop.run(linear_recipe, tmp_path, hang_timeout=TIMEOUT)
    assert result.step == 12 and not alarms


def test_a_silent_loader_raises_the_alarm(linear_recipe, tmp_path, alarms):
    def stall(step, rows):
        if step == 6:
            time.sleep(LONG)

    loop.run(linear_recipe, tmp_path, hang_timeout=TIMEOUT, on_step=stall)
    assert alarms and alarms[0] > TIMEOUT
