# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: the only place that names mesh axes."""

from attnjax.parallel.constrain import constrain
from attnjax.parallel.context import context_attention, dispatch, plan_context, undispatch
from attnjax.parallel.distributed import distributed_attention
from attnjax.parallel.distributed_devices import distributed_mesh
from attnjax.parallel.distributed_layer import attention_layer
from attnjax.parallel.distributed_plan import DistributedPlan, Machine, plan_distributed
from attnjax.parallel.mesh import AXES, make_mesh
from attnjax.parallel.rules import (
    DEFAULT_AXES,
    batch_sharding,
    process_shard,
    replicated,
    tree_shardings,
)
from attnjax.parallel.streaming import streamed_attention

__all__ = [
    "AXES",
    "DEFAULT_AXES",
    "DistributedPlan",
    "Machine",
    "attention_layer",
    "batch_sharding",
    "constrain",
    "context_attention",
    "dispatch",
    "distributed_attention",
    "distributed_mesh",
    "make_mesh",
    "plan_context",
    "plan_distributed",
    "process_shard",
    "replicated",
    "streamed_attention",
    "tree_shardings",
    "undispatch",
]
