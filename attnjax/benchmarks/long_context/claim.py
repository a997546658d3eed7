# SPDX-License-Identifier: Apache-2.0
"""The numbers of the claim: how evenly a placement spreads drawn masks, by planning alone."""

import dataclasses

import numpy as np

from attnjax.benchmarks.long_context import layouts
from attnjax.benchmarks.long_context.balance import rank_areas, spread
from attnjax.benchmarks.long_context.lengths import sampler
from attnjax.benchmarks.long_context.patterns import PATTERNS, Setting, draw


@dataclasses.dataclass(frozen=True)
class PlacementBalance:
    """Largest over mean area of a placement, the worst of several drawn masks.

    Attributes:
      pattern: key of `PATTERNS`.
      placement: key of `layouts.PLACEMENTS`.
      ranks: number of ranks.
      tokens_per_rank: their tokens.
      distribution: of document lengths, see `lengths.sampler`.
      chunk: tokens that "balanced" moves together; 0 for what its plans choose.
      draws: masks for each seed.
    """

    pattern: str
    placement: str
    ranks: int = 64
    tokens_per_rank: int = 8192
    distribution: str = "pile"
    chunk: int = 0
    draws: int = 5

    def __post_init__(self):
        for name, table in (("pattern", PATTERNS), ("placement", layouts.PLACEMENTS)):
            if getattr(self, name) not in table:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown; choose from {list(table)}"
                )
        for name in ("ranks", "tokens_per_rank", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        sampler(self.distribution)

    def __call__(self, seed: int) -> float:
        """Return the worst of the masks drawn from a seed."""
        total, worst = self.ranks * self.tokens_per_rank, 0.0
        for index in range(self.draws):
            rng = np.random.default_rng((seed, index))
            drawn = draw(self.pattern, total, Setting(distribution=self.distribution), rng)
            positions = layouts.place(self.placement, drawn, self.ranks, self.chunk)
            areas = rank_areas(drawn.mask, total, positions)
            worst = max(worst, spread(areas).max_over_mean)
        return worst
