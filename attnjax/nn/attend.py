# SPDX-License-Identifier: Apache-2.0
"""Where modules meet attention: on one device's tokens, or on tokens divided over a mesh."""

from typing import Any

import jax

from attnjax import parallel
from attnjax.ops import attention
from attnjax.parallel.rules import LOGICAL_AXES
from attnjax.typing import Array

METHOD = "context:"
"""Prefix of an implementation that names a method of `parallel.context_attention`."""

_WHOLE = ("return_probabilities", "return_scores", "edit")
"""Options that make the whole map of scores exist, so that dividing the tokens saves nothing."""


def attend(
    query: Array, key: Array, value: Array, *, implementation: str | None = None, **options: Any
) -> Any:
    """Attend with `ops.attention`, or, where the ambient mesh divides tokens, context-parallel.

    Args:
      query: `[b,t,n,h]`, in the order of the whole sequence.
      key: `[b,s,k,h]`, likewise.
      value: `[b,s,k,hv]`.
      implementation: as in `ops.attention`; or "context:ring", "context:usp", ...: the method to
        use where tokens are divided, which means nothing elsewhere.
      **options: of `ops.attention`.

    Returns:
      What `ops.attention` returns.

    Raises:
      ValueError: an argument cannot mean anything.
      NotImplementedError: nobody serves an option.
    """
    method = "auto"
    if implementation is not None and implementation.startswith(METHOD):
        method, implementation = implementation.removeprefix(METHOD), None
    if implementation is not None:
        options["implementation"] = implementation
    (axis,) = LOGICAL_AXES["sequence"]
    mesh = jax.sharding.get_abstract_mesh()
    is_divided = mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes
    if not is_divided or any(options.get(name) for name in _WHOLE):
        return attention(query, key, value, **options)
    return parallel.context_attention(query, key, value, method=method, axis=axis, **options)
