# SPDX-License-Identifier: Apache-2.0
"""CrossViT's claim: fusing two patch scales by class-token cross-attention is worth it.

The abstract's comparison (2 % over DeiT on ImageNet) needs weeks of accelerators; what it rests on,
that cross-attention carries information between branches that a late ensemble cannot combine, is
measured on data with known truth, and the digits show that the whole system trains.
"""

from attnjax.claim import Arm, Claim, Condition

EXCHANGE = "configs/crossvit/information_exchange.py"
DIGITS = "configs/crossvit/digits.py"


def get_claim() -> Claim:
    return Claim(
        statement="Class-token cross-attention exchanges information between the branches: "
        "accuracy >= 0.95 where the label is the XOR of one bit per branch, and >= 0.95 on digits.",
        baseline="The same two branches without fusion (mean of both heads): at most 0.75 in "
        "theory, <= 0.78 asked.",
        arms={
            "exchange_cross": Arm(f"{EXCHANGE}:cross", "test/accuracy"),
            "exchange_none": Arm(f"{EXCHANGE}:none", "test/accuracy"),
            "digits_cross": Arm(f"{DIGITS}:cross", "test/accuracy"),
            "digits_none": Arm(f"{DIGITS}:none", "test/accuracy"),
            "digits_fine": Arm(f"{DIGITS}:fine", "test/accuracy"),
            "digits_coarse": Arm(f"{DIGITS}:coarse", "test/accuracy"),
        },
        conditions=(
            Condition("exchange_cross", ">=", 0.95),
            Condition("exchange_none", "<=", 0.78),
            Condition("digits_cross", ">=", 0.95),
        ),
        effect="exchange_cross - exchange_none",
    )
