# SPDX-License-Identifier: Apache-2.0
"""LongCA-bench's claim: chunks dispatched by visible area balance masks that zig-zag cannot.

The figures of the paper (speed on up to 96 GPUs) need the machines; what they rest on, how evenly
each placement spreads the visible area of drawn masks over 64 ranks of 8,192 tokens, is planning
and is measured exactly. The zig-zag compared with cuts every document by itself, the stronger of
the two kinds; documents are of the Pile's lengths, and the prefix is the documents' own. Zig-zag
loses where documents are short beside twice the ranks: on 8 ranks it is no less even than chunks.
"""

from attnjax.claim import Claim, Condition, Measurement


def arm(pattern: str, placement: str) -> Measurement:
    return Measurement("placement_balance", {"pattern": pattern, "placement": placement})


def get_claim() -> Claim:
    return Claim(
        statement="Largest over mean visible area at 64 ranks: <= 1.05 for chunks dispatched by "
        "area on causal documents, and less than zig-zag's on shared questions and prefixes.",
        baseline="Zig-zag of each document, which is even on a causal mask: 1.0.",
        arms={
            "balanced_document": arm("causal_document", "balanced"),
            "zigzag_document": arm("causal_document", "document_zigzag"),
            "balanced_question": arm("share_question", "balanced"),
            "zigzag_question": arm("share_question", "document_zigzag"),
            "balanced_prefix": arm("prefix_lm_document", "balanced"),
            "zigzag_prefix": arm("prefix_lm_document", "document_zigzag"),
            "zigzag_causal": arm("causal", "zigzag"),
        },
        conditions=(
            Condition("balanced_document", "<=", 1.05),
            Condition("balanced_document - zigzag_document", "<=", 0.0),
            Condition("balanced_question - zigzag_question", "<", 0.0),
            Condition("balanced_prefix - zigzag_prefix", "<", 0.0),
            Condition("zigzag_causal", "<=", 1.0),
        ),
        effect="zigzag_question - balanced_question",
    )
