# SPDX-License-Identifier: Apache-2.0
"""Pure functions on arrays: the attention core and what belongs around it.

attention        softmax attention, whichever implementation is fastest
bicubic_resize   resampling of pictures
"""

from attnjax.ops.attention import IMPLEMENTATIONS, NORMALIZERS, AttentionOutput, attention
from attnjax.ops.sample import bicubic_resize

__all__ = [
    "IMPLEMENTATIONS",
    "NORMALIZERS",
    "AttentionOutput",
    "attention",
    "bicubic_resize",
]
