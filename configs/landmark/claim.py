# SPDX-License-Identifier: Apache-2.0
"""The claim of landmark attention, where it is known what must be found.

Trained on 8 blocks and read in chunks of 32 tokens; a window of 32 tokens, in one or two layers,
reaches the key by chance only.
"""

from attnjax.claim import Arm, Claim, Condition

RECIPE = "configs/landmark/key_recall.py"


def get_claim() -> Claim:
    arm = lambda variant, blocks, **more: Arm(
        f"{RECIPE}:{variant}", f"blocks_{blocks}/exact_match", more
    )
    return Claim(
        statement="Read through its cache, landmark attention finds a key among four times as many "
        "blocks as in training, where a sliding window of equal local length does not.",
        baseline="The same network with a sliding window as long as the chunks.",
        arms={
            "landmark_8": arm("landmark", 8),
            "landmark_32": arm("landmark", 32),
            "landmark_128": arm("landmark", 128),
            "window_32": arm("window", 32),
        },
        conditions=(
            Condition("landmark_32", ">=", 0.9),
            Condition("window_32", "<", 0.2),
        ),
        effect="landmark_32 - window_32",
    )
