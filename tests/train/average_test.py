# SPDX-License-Identifier: Apache-2.0
"""The mean of the last checkpoints: which they are, that it is the mean, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.errors import NoUsableCheckpoint, RecipeError
from attnjax.parallel import make_mesh, replicated
from attnjax.train.average import average_params
from attnjax.train.checkpoint import Checkpointer, complete_steps


def params_of(step):
    return {"layer": {"kernel": jnp.full((4, 2), float(step**2)), "bias": jnp.arange(2.0) * step}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 to 5, four of which are kept."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpointer = Checkpointer(folder, every=1, keep=4)
    for step in range(1, 6):
        state = {"params": params_of(step), "step": jnp.int32(step)}
        checkpointer.save(step, state, data_state={}, record={})
    checkpointer.close()
    return folder


@pytest.fixture(scope="module")
def target():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), params_of(1)
    )


def test_mean_of_the_newest(saved, target):
    assert complete_steps(saved) == [5, 4, 3, 2]
    for count in (1, 3, 4):
        mean, steps = average_params(saved, target, count)
        assert steps == [5, 4, 3, 2][:count]
        expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *map(params_of, steps))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mean, expected)
        assert mean["layer"]["kernel"].sharding == target["layer"]["kernel"].sharding


def test_damaged_ones_are_left_out(saved, target):
    (saved / "4/run/metadata").write_bytes(b"{}")
    _, steps = average_params(saved, target, 3)
    assert steps == [5, 3, 2]
    with pytest.raises(NoUsableCheckpoint, match=r"needs as many, .* has 3 sound ones .*step 4"):
        average_params(saved, target, 4)


def test_refusals(saved, target, tmp_path):
    with pytest.raises(RecipeError, match="the mean of 0 checkpoints: must be at least 1"):
        average_params(saved, target, 0)
    for count in (1, 2):
        with pytest.raises(NoUsableCheckpoint, match=str(tmp_path)):
            average_params(tmp_path, target, count)
    other = {"layer": {"kernel": target["layer"]["kernel"]}}
    with pytest.raises(RecipeError, match="does not fit"):
        average_params(saved, other, 2)
