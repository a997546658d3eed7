# SPDX-License-Identifier: Apache-2.0
"""Reading one record: strict, or replaced by its neighbour when the source tolerates bad ones."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from attnjax import registry
from attnjax.errors import AttnjaxError, RecipeError

ON_ERROR = ("raise", "skip")

MAX_BAD_RUN = 64
"""Consecutive unreadable records after which a tolerant source gives up as well."""

_log = logging.getLogger(__name__)


class BadRecord(AttnjaxError):
    """A record cannot be read or transformed; the message names its index and its file."""


def check_on_error(on_error: str) -> str:
    """Return `on_error` when it is "raise" or "skip", else raise RecipeError."""
    if on_error not in ON_ERROR:
        raise RecipeError(f"source.on_error={on_error!r}: {registry.nearest(on_error, ON_ERROR)}")
    return on_error


def locate(source: Any, index: int) -> str:
    """Return "record 7", with the file when the source knows it (`source.locate(index)`)."""
    where = getattr(source, "locate", None)
    return f"record {index} ({where(index)})" if where else f"record {index}"


def read(
    source: Any,
    pipeline: Callable,
    index: int,
    generator: Callable[[], np.random.Generator | None],
) -> tuple[dict, int]:
    """Read and transform one example.

    A source whose `on_error` attribute is "skip" has a bad record replaced by the next readable one
    (cyclically), transformed with the randomness of the original position; nothing else moves.

    Args:
      source: has `__len__` and `__getitem__`, optionally `on_error` and `locate`.
      pipeline: called with the example and a generator.
      index: position in the source.
      generator: makes the random generator of this position afresh at every call.

    Returns:
      The transformed example and the index of the record it was made from.

    Raises:
      BadRecord: the record is bad and the source is strict, or too many are bad in a row.
    """
    tolerant = getattr(source, "on_error", "raise") == "skip"
    size = len(source)
    attempts = min(size, MAX_BAD_RUN) if tolerant else 1
    for attempt in range(attempts):
        candidate = (index + attempt) % size
        try:
            return pipeline(source[candidate], generator()), candidate
        except RecipeError:
            raise
        except Exception as error:
            reason = f"{locate(source, candidate)}: {type(error).__name__}: {error}"
            if not tolerant:
                raise BadRecord(reason) from error
            _log.warning("replaced %s", reason)
    raise BadRecord(f"{attempts} bad records in a row, the last one {reason}")
