# SPDX-License-Identifier: Apache-2.0
"""Pure functions on arrays: the attention core and what belongs around it.

attention           attention, whichever implementation is fastest
mask                masks as values
normalizers         softmax, its relatives and alternatives
merge_partials      attention over disjoint sets of keys, merged
decode_attention    attention of a few queries to many keys, in parts
landmark_attention  attention through landmarks that gate their blocks
select_blocks       the blocks of keys worth attending to, as a mask
assign_experts      tokens to the places of a mixture of experts
bicubic_resize      resampling of pictures
cache               keys and values of a stream, kept from step to step

`attnjax.ops.bias` holds biases that are functions of position, `attnjax.ops.positions` rotary
positions and norms of queries and keys, `attnjax.ops.mixers` token mixers of all families by name,
`attnjax.ops.relaxed` attention with one principle given up.
"""

from attnjax.ops import cache, mask, normalizers
from attnjax.ops.attention import IMPLEMENTATIONS, AttentionOutput, attention
from attnjax.ops.decode import decode_attention
from attnjax.ops.landmark import landmark_attention
from attnjax.ops.merge import merge_partials
from attnjax.ops.normalizer import EMPTY_LSE
from attnjax.ops.normalizers import NORMALIZERS
from attnjax.ops.routing import assign_experts, select_blocks
from attnjax.ops.sample import bicubic_resize
from attnjax.ops.statistics import STATISTICS, TokenMass

__all__ = [
    "EMPTY_LSE",
    "IMPLEMENTATIONS",
    "NORMALIZERS",
    "STATISTICS",
    "AttentionOutput",
    "TokenMass",
    "assign_experts",
    "attention",
    "bicubic_resize",
    "cache",
    "decode_attention",
    "landmark_attention",
    "mask",
    "merge_partials",
    "normalizers",
    "select_blocks",
]
