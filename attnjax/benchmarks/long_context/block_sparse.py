# SPDX-License-Identifier: Apache-2.0
"""Block maps of a given density, blocks of equal or of random sizes (patterns 13 and 14).

Scores of pairs of blocks are uniform random numbers; the largest are kept, over all pairs of a head
or row by row. With grouped heads there is one map for each key/value head.
"""

import dataclasses

import numpy as np

from attnjax.ops import mask

SELECTIONS = ("head", "row")
"""Top-k over all pairs of a head, or over the keys of each block of queries."""


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A block-sparse mask as arrays.

    Attributes:
      kept: bool `[k, i, j]`, one map for each key/value head.
      query_sizes: int `[k, i]`, tokens of the blocks of queries.
      key_sizes: int `[k, j]`, tokens of the blocks of keys.
    """

    kept: np.ndarray
    query_sizes: np.ndarray
    key_sizes: np.ndarray

    def mask(self, heads_per_map: int = 1) -> mask.Mask:
        """Return the mask for k * heads_per_map query heads."""
        sizes = (self.query_sizes, self.key_sizes)
        if all((x == x[:1]).all() for x in sizes):
            query, key = (x[0].tolist() for x in sizes)
            return mask.blocks(self.kept, query, key, heads_per_map=heads_per_map)
        per_head = [
            mask.blocks(kept, query.tolist(), key.tolist())
            for kept, query, key in zip(self.kept, *sizes, strict=True)
        ]
        return mask.per_head([one for one in per_head for _ in range(heads_per_map)])


def keep(
    heads: int,
    query_blocks: int,
    key_blocks: int,
    ratio: float,
    rng: np.random.Generator,
    *,
    selection: str = "head",
) -> np.ndarray:
    """Draw which pairs of blocks are kept.

    Args:
      heads: number of maps.
      query_blocks, key_blocks: their size.
      ratio: fraction that is kept; `int(pairs * ratio)` of the pairs chosen from, at least one.
      rng: source of randomness.
      selection: one of `SELECTIONS`.

    Returns:
      bool `[heads, query_blocks, key_blocks]`.

    Raises:
      ValueError: the ratio is not in (0, 1] or the selection unknown.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio}: the kept fraction must be above 0 and at most 1")
    if selection not in SELECTIONS:
        raise ValueError(f"selection {selection!r} is unknown; choose from {list(SELECTIONS)}")
    scores = rng.random((heads, query_blocks, key_blocks))
    shape = (heads, -1) if selection == "head" else (heads * query_blocks, -1)
    rows = scores.reshape(shape)
    count = max(1, int(rows.shape[1] * ratio))
    chosen = np.argpartition(rows, rows.shape[1] - count, axis=1)[:, rows.shape[1] - count :]
    kept = np.zeros(rows.shape, bool)
    np.put_along_axis(kept, chosen, True, axis=1)
    return kept.reshape(scores.shape)


def equal_sizes(total: int, block: int) -> np.ndarray:
    """Cut a length into blocks of one size; the last takes what is left, int `[blocks]`."""
    _check_block(total, block)
    count = -(-total // block)
    return np.array([block] * (count - 1) + [total - block * (count - 1)])


def random_sizes(total: int, block: int, minimum: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a length into blocks of random sizes.

    Args:
      total: length.
      block: mean size: there are as many blocks as with `equal_sizes`.
      minimum: smallest size.
      rng: source of randomness.

    Returns:
      int `[blocks]`, each at least `minimum`, summing to the total.

    Raises:
      ValueError: that many blocks of the smallest size do not fit.
    """
    _check_block(total, block)
    count = -(-total // block)
    rest = total - minimum * count
    if minimum < 1 or rest < 0:
        raise ValueError(f"{count} blocks of at least {minimum} do not fit {total} tokens")
    cuts = np.sort(rng.integers(0, rest, count - 1, endpoint=True))
    return minimum + np.diff(cuts, prepend=0, append=rest)


def uniform(
    heads: int,
    total: int,
    block: int,
    ratio: float,
    rng: np.random.Generator,
    *,
    selection: str = "head",
) -> BlockSparse:
    """Draw a mask of equal blocks of queries and keys (pattern 13); see `keep`."""
    sizes = equal_sizes(total, block)
    kept = keep(heads, len(sizes), len(sizes), ratio, rng, selection=selection)
    repeated = np.tile(sizes, (heads, 1))
    return BlockSparse(kept, repeated, repeated)


def variable(
    heads: int,
    total: int,
    block: int,
    ratio: float,
    rng: np.random.Generator,
    *,
    minimum: int,
    selection: str = "head",
    is_per_head: bool = False,
) -> BlockSparse:
    """Draw a mask of blocks of random sizes, those of queries and keys apart (pattern 14).

    Args:
      heads, total, ratio, rng, selection: see `keep`.
      block: mean size of the blocks.
      minimum: smallest size.
      is_per_head: whether each map has blocks of its own instead of the same for all.
    """
    draws = heads if is_per_head else 1
    query, key = (
        np.stack([random_sizes(total, block, minimum, rng) for _ in range(draws)]) for _ in "qk"
    )
    kept = keep(heads, query.shape[1], key.shape[1], ratio, rng, selection=selection)
    return BlockSparse(kept, *(np.broadcast_to(x, (heads, x.shape[1])) for x in (query, key)))


def _check_block(total, block):
    if not 1 <= block <= total:
        raise ValueError(f"block={block}: must be at least 1 and at most the {total} tokens")
