# SPDX-License-Identifier: Apache-2.0
"""Distributed multi-head attention by a plan: heads x blocks of queries x blocks of keys.

The built component of "A Unified View of Long-Sequence Models towards Modeling Million-Scale
Dependencies" (arXiv 2302.06218), of which only the abstract could be read: the design is ours.
"""

from attnjax.parallel.distributed.attention import distributed_attention
from attnjax.parallel.distributed.devices import distributed_mesh
from attnjax.parallel.distributed.layer import attention_layer
from attnjax.parallel.distributed.plan import DistributedPlan, Machine, plan_distributed
from attnjax.parallel.distributed.streaming import streamed_attention

__all__ = [
    "DistributedPlan",
    "Machine",
    "attention_layer",
    "distributed_attention",
    "distributed_mesh",
    "plan_distributed",
    "streamed_attention",
]
