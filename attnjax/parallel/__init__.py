# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: the only place that names mesh axes."""

from attnjax.parallel.constrain import constrain
from attnjax.parallel.context import context_attention, dispatch, plan_context, undispatch
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
    "context_attention",
    "dispatch",
    "make_mesh",
    "plan_context",
    "process_shard",
    "replicated",
    "tree_shardings",
    "undispatch",
]
