# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own claim: what it says about reach and context is true where truth is known.

The paper's abstract says that long context helps, though depending on the application, and that
distributed attention is almost 40 times faster on four GPUs. No table of it was available, so the
claim measured here is that the benchmark tells mixers that see enough from those that do not:
errors match the closed form (S - r) / S^2 of a moving average of span S = 8 for reach r, mixers
that reach further are far below it, and accuracy on the needle grows with every doubling of
context, as far as the truth does.
"""

from attnjax.claim import Arm, Claim, Condition

AVERAGE = "configs/unified_long_sequence/moving_average.py"
NEEDLE = "configs/unified_long_sequence/needle.py"
SPAN = 8

LIMITED = {"window_2": 2, "window_4": 4}
FULL = ("convolution", "s4d")
CEILINGS = {"context_4": 0.5, "context_16": 0.75, "context_64": 1.0}


def floor(reach: int) -> float:
    """Mean squared error of the best predictor."""
    return (SPAN - reach) / SPAN**2


def get_claim() -> Claim:
    arms = {name: Arm(f"{AVERAGE}:{name}", "test/squared_error") for name in (*LIMITED, *FULL)}
    arms |= {name: Arm(f"{NEEDLE}:{name}", "test/accuracy") for name in CEILINGS}
    conditions = []
    for name, reach in LIMITED.items():
        conditions.append(Condition(name, ">=", 0.9 * floor(reach)))
        conditions.append(Condition(name, "<=", 1.1 * floor(reach)))
    conditions += [Condition(name, "<", 0.1 * floor(LIMITED["window_4"])) for name in FULL]
    conditions += [
        Condition("window_2 - window_4", ">", 0.0),
        Condition("window_4 - s4d", ">", 0.0),
        Condition("context_16 - context_4", ">", 0.0),
        Condition("context_64 - context_16", ">", 0.0),
    ]
    return Claim(
        statement="Mixers of limited reach end within 10 % of the closed-form error floor of a "
        "moving average, mixers of full reach below a tenth of it, and gain from context is "
        "monotone.",
        baseline="The same model with a window of 2 or 4 of the 8 positions that matter; the same "
        "model with a quarter or a sixteenth of the context.",
        arms=arms,
        conditions=tuple(conditions),
        effect="context_64 - context_4",
    )
