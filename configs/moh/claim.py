# SPDX-License-Identifier: Apache-2.0
"""The claim of mixture-of-head attention: fewer heads at work, as good.

On pictures by accuracy, within two test images of a hundred; samples of DiT by how many of them a
classifier recognises. The Frechet distance of samples is shown beside it.
"""

from attnjax.claim import Arm, Claim, Condition


def get_claim() -> Claim:
    picture = lambda variant: Arm(f"configs/moh/digits.py:{variant}", "test/accuracy")
    sample = lambda variant, metric: Arm(
        f"configs/moh/dit_digits.py:{variant}", f"samples/{metric}"
    )
    return Claim(
        statement="With three quarters of its heads at work a vision transformer classifies as "
        "well as with all, and a diffusion transformer's samples are recognised as often.",
        baseline="The same networks with all heads and no gates.",
        arms={
            "dense": picture("dense"),
            "moh_75": picture("moh_75"),
            "moh_50": picture("moh_50"),
            "unbalanced": picture("unbalanced"),
            "dit_dense": sample("dense", "recognised"),
            "dit_75": sample("moh_75", "recognised"),
            "dit_dense_frechet": sample("dense", "frechet"),
            "dit_75_frechet": sample("moh_75", "frechet"),
        },
        conditions=(
            Condition("moh_75 - dense", ">=", -0.02),
            Condition("dit_75 - dit_dense", ">=", -0.03),
        ),
        effect="moh_75 - dense",
    )
