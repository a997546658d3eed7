# SPDX-License-Identifier: Apache-2.0
"""CAB: how attentions compare, by pattern, by task, by cost.

Zhang et al., "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling", arXiv
2210.07661. The attentions are in `attnjax.ops.efficient`; what trains them on tasks and fills the
leaderboard is `attnjax.train.cab_board`. Here is what is made of the numbers: the compositional
index, the efficiency length, correlations and the benefit of attention.
"""

PAPER = {
    "title": "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
    "id": "arXiv:2210.07661",
    "year": 2023,
    "code": "https://github.com/Shark-NLP/CAB",
    "licence": "MIT (the attentions)",
    "claim": "Efficient attentions that do well in one pattern need not do so in another.",
}
