# SPDX-License-Identifier: Apache-2.0
"""The claim of landmark attention, where it is known what must be found.

Trained on 8 blocks and read in chunks of 32 tokens, of which a token sees those of its own. Two
layers with a window of 16 tokens reach 31 back, as far as a chunk; with a window of 32 tokens, 63,
which among 32 blocks of 8 tokens holds a quarter of the keys.
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
        baseline="The same network with sliding windows that reach as far back as a chunk.",
        arms={
            "landmark_8": arm("landmark", 8),
            "landmark_32": arm("landmark", 32),
            "landmark_128": arm("landmark", 128),
            "window_16": arm("window", 32, **{"model.window": 16}),
            "window_32": arm("window", 32),
            "right_block": Arm(f"{RECIPE}:landmark", "blocks_32/retrieved"),
        },
        conditions=(
            Condition("landmark_32", ">=", 0.9),
            Condition("window_16", "<", 0.2),
        ),
        effect="landmark_32 - window_32",
    )
