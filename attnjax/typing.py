# SPDX-License-Identifier: Apache-2.0
"""Array types and the axis legend of the whole project.

Arrays of rank three or more inside `ops`, `nn` and `models` carry their axes as a suffix
(`query_btnh`, `scores_bnts`), and einsum strings use the same letters:

    b batch      t queries     s keys        n query heads   k key/value heads
    h head width d model width f hidden      v vocabulary    l layers
    e experts    c channels    y rows        x columns       p patches
    r record or agent
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
PRNGKey: TypeAlias = jax.Array
"""A typed key (`jax.random.key`), never a raw `uint32` pair."""

Batch: TypeAlias = Mapping[str, Array]
"""Arrays by name; the first axis of every entry is the example."""

Params: TypeAlias = Any
"""A tree of arrays: what `task.init` returns and `task.loss` takes."""
