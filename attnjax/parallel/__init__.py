# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: the only place that names mesh axes."""

from attnjax.parallel.constrain import constrain, gather
from attnjax.parallel.mesh import AXES, make_mesh
from attnjax.parallel.rules import (
    DEFAULT_AXES,
    batch_sharding,
    process_shard,
    replicated,
    tree_shardings,
)

__all__ = [
    "AXES",
    "DEFAULT_AXES",
    "batch_sharding",
    "constrain",
    "gather",
    "make_mesh",
    "process_shard",
    "replicated",
    "tree_shardings",
]
