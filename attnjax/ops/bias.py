# SPDX-License-Identifier: Apache-2.0
"""Biases that are functions of position, computed tile by tile and never held as a matrix."""

import abc
import math

import jax.numpy as jnp
import numpy as np

from attnjax.ops.normalizer import register
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


@register(("slopes",))
class Alibi(Bias):
    """-slope |query - key|: linear biases (Press et al., arXiv 2108.12409, Section 3).

    Add a causal mask for the paper's form; without one it is the symmetric form for encoders.

    Attributes:
      slopes: `[n]`, see `alibi_slopes`; may be learnt.
    """

    slopes: Array

    def check(self, b, n, t, s):
        _check_table("slopes", self.slopes, n, ())

    def tile(self, query_start, key_start, rows, columns, t, s):
        distance = jnp.abs(_relative(query_start, key_start, rows, columns, t, s))
        slopes = jnp.asarray(self.slopes)
        return -slopes[None, :, None, None] * distance.astype(slopes.dtype)


def alibi_slopes(n: int) -> np.ndarray:
    """Return the paper's slopes for n heads, `[n]` float32.

    2^(-8/n), 2^(-16/n), ..., 2^-8 for a power of two; otherwise those of the largest power of two
    p below n, followed by the 1st, 3rd, ... of those for 2 p.

    Raises:
      ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"n={n}: slopes are for at least one head")
    power = 2 ** (n.bit_length() - 1)
    geometric = lambda count: 2.0 ** (-8.0 / count * np.arange(1, count + 1))
    slopes = np.concatenate([geometric(power), geometric(2 * power)[::2][: n - power]])
    return slopes.astype(np.float32)


@register(("table",))
class RelativePosition(Bias):
    """A learnt number for every clipped distance: table[head, clip(key - query, -r, r) + r].

    The scalar form of Shaw et al., "Self-Attention with Relative Position Representations",
    arXiv 1803.02155, Eq. 4 (their form with vectors depends on the query).

    Attributes:
      table: `[n, 2 r + 1]`, or `[1, 2 r + 1]` for all heads.
    """

    table: Array

    def check(self, b, n, t, s):
        _check_table("table", self.table, n, (None,))
        if self.table.shape[1] % 2 == 0:
            raise ValueError(f"table must have 2 r + 1 columns, got {self.table.shape[1]}")

    def tile(self, query_start, key_start, rows, columns, t, s):
        reach = self.table.shape[1] // 2
        relative = _relative(query_start, key_start, rows, columns, t, s)
        return jnp.asarray(self.table)[:, jnp.clip(relative, -reach, reach) + reach][None]


@register(("table",))
class RelativeBuckets(Bias):
    """A learnt number for every bucket of distances, as in T5 (arXiv 1910.10683, Section 2.1).

    The first half of the buckets of a direction hold one distance each, the others grow
    logarithmically up to `max_distance`; the last one takes everything beyond.

    Attributes:
      table: `[n, buckets]`, or `[1, buckets]` for all heads. (T5 stores the transpose, and has no
        scale: `attention(..., scale=1.0)`.)
      max_distance: where the last bucket begins at the latest.
      is_bidirectional: half of the buckets are for keys behind the query; otherwise those are all
        in bucket 0.
    """

    table: Array
    max_distance: int = 128
    is_bidirectional: bool = True

    def check(self, b, n, t, s):
        _check_table("table", self.table, n, (None,))
        buckets = self.table.shape[1]
        if not buckets or buckets % (4 if self.is_bidirectional else 2):
            raise ValueError(f"{buckets} buckets cannot be split into equal parts")
        exact = buckets // (4 if self.is_bidirectional else 2)
        if self.max_distance <= exact:
            raise ValueError(f"max_distance={self.max_distance} must exceed {exact}")

    def tile(self, query_start, key_start, rows, columns, t, s):
        buckets = self.table.shape[1]
        relative = _relative(query_start, key_start, rows, columns, t, s)
        if self.is_bidirectional:
            buckets //= 2
            distance, offset = jnp.abs(relative), jnp.where(relative > 0, buckets, 0)
        else:
            distance, offset = jnp.maximum(-relative, 0), 0
        of_distance = bucket_of_distance(buckets, self.max_distance)
        bucket = jnp.asarray(of_distance)[jnp.minimum(distance, self.max_distance)] + offset
        return jnp.asarray(self.table)[:, bucket][None]


def bucket_of_distance(buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of the distances 0 to `max_distance` in one direction, int32.

    bucket(x) = x below e = buckets / 2, then
    min(e + floor(log(x / e) / log(max_distance / e) * (buckets - e)), buckets - 1)
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    # Where the quotient is a whole number in truth, rounding must not push it below.
    large = exact + np.floor(ratio * (buckets - exact) + 1e-9).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(large, buckets - 1)).astype(np.int32)


def _relative(query_start, key_start, rows, columns, t, s):
    """Key minus query position, int32 `[rows, columns]`."""
    query = query_start + (s - t) + jnp.arange(rows, dtype=jnp.int32)
    key = key_start + jnp.arange(columns, dtype=jnp.int32)
    return key - query[:, None]


def _check_table(name, table, n, rest):
    shape = jnp.shape(table)
    fits = len(shape) == 1 + len(rest) and shape[0] in (1, n)
    dtype = jnp.result_type(table)
    if not fits or not jnp.issubdtype(dtype, jnp.floating):
        axes = "[n]" if not rest else "[n, ...]"
        raise ValueError(f"{name} must be floating {axes} with n = {n} or 1, got {dtype} {shape}")
