# SPDX-License-Identifier: Apache-2.0
"""Mesh sizes: filling in -1 and refusing what does not divide."""

import jax
import pytest

from attnjax.errors import RecipeError
from attnjax.parallel import AXES, make_mesh
from attnjax.parallel.mesh import resolve_sizes


def test_free_axis_takes_what_is_left():
    assert resolve_sizes({"data": -1, "model": 2}, 8) == {
        "data": 4,
        "fsdp": 1,
        "model": 2,
        "context": 1,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not divide the 8 devices"),
        ({"data": -1, "model": 3}, "does not divide the 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one axis"),
        ({"tensor": 2}, "unknown axis 'tensor'"),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(RecipeError, match=message):
        resolve_sizes(sizes, 8)


def test_mesh_has_four_automatic_axes():
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    assert mesh.axis_names == AXES
    assert mesh.size == 8
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_mesh_on_some_devices():
    mesh = make_mesh({"data": -1}, jax.devices()[:2])
    assert mesh.shape["data"] == 2
    assert make_mesh({"data": 1}, jax.devices()[:1]).size == 1


class _Chip:
    """A device of a two-slice TPU pod, as far as mesh building looks at it."""

    platform = "tpu"
    device_kind = "TPU v4"
    process_index = 0

    def __init__(self, index):
        self.id, self.slice_index = index, index // 4
        self.coords, self.core_on_chip = (index % 2, index % 4 // 2, 0), 0


def test_only_data_crosses_slices():
    chips = [_Chip(i) for i in range(8)]
    mesh = make_mesh({"data": 2, "model": 4}, chips)
    for row in mesh.devices.reshape(2, 4):
        assert len({chip.slice_index for chip in row}) == 1
    with pytest.raises(RecipeError, match="2 slices"):
        make_mesh({"model": 8}, chips)
