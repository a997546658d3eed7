# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence that is divided between devices, for every mask of the core."""

from attnjax.parallel.context.attention import context_attention
from attnjax.parallel.context.layout import Layout, dispatch, undispatch
from attnjax.parallel.context.plan import METHODS, ContextPlan, plan_context

__all__ = [
    "METHODS",
    "ContextPlan",
    "Layout",
    "context_attention",
    "dispatch",
    "plan_context",
    "undispatch",
]
