# SPDX-License-Identifier: Apache-2.0
"""The largest published preset takes the same step on eight devices as on one."""

import dataclasses

import jax
import numpy as np
import pytest

from attnjax import recipe as recipe_lib
from attnjax.parallel import make_mesh
from attnjax.recipe import Mesh
from attnjax.train.program import build

# Float32: eight devices add up the loss and the gradients in another order.
TOLERANCE = 1e-5


def one_step(sizes, devices):
    recipe = recipe_lib.load("configs/crossvit/imagenet.py:18-dagger-384")
    recipe.batch, recipe.mesh = 8, Mesh(**sizes)
    recipe.model |= {"dtype": "float32", "remat": "blocks"}
    mesh = make_mesh(dataclasses.asdict(recipe.mesh), jax.devices()[:devices])
    program = build(recipe.validate(), mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal(program.batch["image"].shape, np.float32),
        "label": rng.integers(0, 1000, recipe.batch).astype(np.int32),
    }
    with jax.set_mesh(mesh):
        _, metrics = program.step(program.init(), program.to_device(batch))
    return program.parameter_count, {k: float(metrics[k]) for k in ("loss", "grad_norm")}


@pytest.mark.slow
def test_18_dagger_384_on_eight_devices():
    count, alone = one_step({"data": 1}, 1)
    assert count == 44_606_560
    _, shared = one_step({"data": 2, "fsdp": 4}, 8)
    assert shared["loss"] == pytest.approx(alone["loss"], abs=TOLERANCE)
    assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
