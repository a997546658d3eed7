# SPDX-License-Identifier: Apache-2.0
"""Numbers of tokens of every example: checked as far as they are known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.typing import Array


def check_lengths(lengths: Array, b: int, most: int, bound: str) -> Array:
    """Return lengths as int32 `[b]`.

    Args:
      lengths: integers `[b]`; may be traced.
      b: number of examples.
      most: largest length.
      bound: what that is, for the message, with its number.

    Raises:
      ValueError: they are no integers of this shape, or one that is known is not in [0, most].
    """
    if jnp.shape(lengths) != (b,) or not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise ValueError(
            f"lengths must be integers [b] = ({b},), got {jnp.result_type(lengths)} "
            f"{jnp.shape(lengths)}"
        )
    for example, length in enumerate(known(lengths) or ()):
        if not 0 <= length <= most:
            raise ValueError(f"lengths[{example}]={length}: choose from 0 to {bound}")
    return jnp.asarray(lengths, jnp.int32)


def known(array: Any) -> Any:
    """Return the values of an array as (lists of) Python numbers, or None while they are traced."""
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array).tolist()
