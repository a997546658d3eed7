# SPDX-License-Identifier: Apache-2.0
"""Sources, pipelines and the elastic iterator that turns a `recipe.Data` into batches.

A source answers `source[i]` with one example (a dict of numpy arrays), a pipeline maps an example
and a random generator to the arrays a model reads, and the iterator decides which example and which
randomness go into which row of which batch: a pure function of the seed and the position.
Nothing is imported before it is used.
"""

import importlib
from typing import Any

_HOMES = {
    "BadRecord": "attnjax.data.records",
    "Order": "attnjax.data.order",
    "build": "attnjax.data.iterator",
    "eval_batches": "attnjax.data.iterator",
    "train_iterator": "attnjax.data.iterator",
}

__all__ = ["BadRecord", "Order", "build", "eval_batches", "train_iterator"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
