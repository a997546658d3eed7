# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: the only place that names mesh axes."""

from attnjax.parallel.constrain import constrain, gather
from attnjax.parallel.context import context_attention, dispatch, plan_context, undispatch
from attnjax.parallel.distributed import (
    DistributedPlan,
    Machine,
    attention_layer,
    distributed_attention,
    distributed_mesh,
    plan_distributed,
    streamed_attention,
)
from attnjax.parallel.mesh import AXES, make_mesh
from attnjax.parallel.pipeline import bubble_fraction, pipeline
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
    "DistributedPlan",
    "Machine",
    "attention_layer",
    "batch_sharding",
    "bubble_fraction",
    "constrain",
    "context_attention",
    "dispatch",
    "distributed_attention",
    "distributed_mesh",
    "gather",
    "make_mesh",
    "pipeline",
    "plan_context",
    "plan_distributed",
    "process_shard",
    "replicated",
    "streamed_attention",
    "tree_shardings",
    "undispatch",
]
