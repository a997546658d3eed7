# SPDX-License-Identifier: Apache-2.0
"""CAB: how attentions compare, by pattern, by task, by cost.

Zhang et al., "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling", arXiv
2210.07661. The attentions are in `attnjax.ops.efficient`; what trains them on tasks and fills the
leaderboard is `attnjax.train.cab_board`. Here is what is made of the numbers: the compositional
index, the efficiency length, correlations and the benefit of attention.
"""
