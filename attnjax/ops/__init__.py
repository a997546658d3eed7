# SPDX-License-Identifier: Apache-2.0
"""Pure functions on arrays: the attention core and what belongs around it.

attention        attention, whichever implementation is fastest
mask             masks as values
merge_partials   attention over disjoint sets of keys, merged
bicubic_resize   resampling of pictures
"""

from attnjax.ops import mask
from attnjax.ops.attention import IMPLEMENTATIONS, AttentionOutput, attention
from attnjax.ops.merge import merge_partials
from attnjax.ops.normalizer import EMPTY_LSE, NORMALIZERS
from attnjax.ops.sample import bicubic_resize
from attnjax.ops.statistics import STATISTICS, TokenMass

__all__ = [
    "EMPTY_LSE",
    "IMPLEMENTATIONS",
    "NORMALIZERS",
    "STATISTICS",
    "AttentionOutput",
    "TokenMass",
    "attention",
    "bicubic_resize",
    "mask",
    "merge_partials",
]
