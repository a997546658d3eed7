# SPDX-License-Identifier: Apache-2.0
"""Biases that are functions of position, computed tile by tile and never held as a matrix."""

import abc

from attnjax.typing import Array


class Bias(abc.ABC):
    """What is added to the scores; a pytree whose leaves receive gradients.

    Positions of queries are those of the last t of s keys: query + s - t.
    """

    @abc.abstractmethod
    def check(self, b: int, n: int, t: int, s: int) -> None:
        """Raise ValueError if the bias does not fit scores `[b,n,t,s]`."""

    @abc.abstractmethod
    def tile(
        self, query_start: Array, key_start: Array, rows: int, columns: int, t: int, s: int
    ) -> Array:
        """Return one tile, `[b|1, n|1, rows, columns]` floating.

        Args:
          query_start, key_start: first query and key; may be traced.
          rows, columns: static size; positions beyond t and s may hold anything finite.
          t, s: lengths.
        """

    def dense(self, t: int, s: int) -> Array:
        """Return the whole bias, `[b|1, n|1, t, s]`."""
        return self.tile(0, 0, t, s, t, s)
