# SPDX-License-Identifier: Apache-2.0
"""CAB's claim: which attention does well depends on the pattern, here where the answers are known.

The paper's figures need its data and machines. What they say of the attentions is measured on tasks
that separate them for a known reason: a window must hold the answer; what lies behind all windows
needs attention, or a state, that reaches the beginning; and in both forms of cross-attention few
slots or random features stand for a source less exactly than softmax attention to all of it.
"""

from attnjax.claim import Arm, Claim, Condition

PERMUTATION = "configs/cab/window_permutation.py"
RECALL = "configs/cab/associative_recall.py"
COPY = "configs/cab/copy_sort.py:copy"
LAG = "configs/cab/lagged_series.py"


def get_claim() -> Claim:
    arms = {
        f"window_{name}": Arm(f"{PERMUTATION}:{variant}", "test/accuracy", {"steps": 250})
        for name, variant in (("8", "local"), ("7", "local_short"), ("performer", "performer"))
    }
    arms |= {
        f"recall_{name}": Arm(f"{RECALL}:{name}", "test/accuracy")
        for name in ("local", "softmax", "s4d", "long_short")
    }
    arms |= {
        f"copy_{name}": Arm(COPY, "test/accuracy", {"steps": 200, "model.cross_attention": name})
        for name in ("softmax", "abc", "performer")
    }
    arms |= {
        f"lag_{name}": Arm(LAG, "test/mse", {"model.cross_attention": name})
        for name in ("softmax", "abc", "performer", "none")
    }
    return Claim(
        statement="Local attention repeats tokens 8 places away if and only if its window holds "
        "them, and Performer does not; behind its window it knows nothing, where softmax, "
        "long-short attention and S4D recall; copying a source, and forecasting a series from one "
        "place of its past, softmax attention leads ABC and Performer of 16 slots and features.",
        baseline="The same model with a window one too small, with local attention, or with "
        "softmax attention to the source.",
        arms=arms,
        conditions=(
            Condition("window_8", ">=", 0.95),
            Condition("window_7", "<=", 0.2),
            Condition("window_8 - window_performer", ">=", 0.3),
            Condition("recall_local", "<=", 0.35),
            Condition("recall_softmax - recall_local", ">=", 0.2),
            Condition("recall_long_short - recall_local", ">=", 0.2),
            Condition("recall_s4d - recall_local", ">=", 0.2),
            Condition("copy_softmax - copy_abc", ">=", 0.1),
            Condition("copy_softmax - copy_performer", ">=", 0.1),
            Condition("lag_softmax", "<=", 0.25),
            Condition("lag_none - lag_softmax", ">=", 0.6),
            Condition("lag_abc - lag_softmax", ">=", 0.2),
            Condition("lag_performer - lag_softmax", ">=", 0.2),
        ),
        effect="window_8 - window_7",
    )
