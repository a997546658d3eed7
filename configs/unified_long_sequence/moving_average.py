# SPDX-License-Identifier: Apache-2.0
"""The mean of the last 8 inputs at every position: a mixer of reach r < 8 is left with an error.

Inputs are -1 or 1, so that the best predictor from the last r of 8 has mean squared error
(8 - r) / 64: 0.09375 for a window of 2, 0.0625 for 4, 0 for 8 and for mixers that see everything.
One block, so that its reach is the window. Variants: window_2, window_4, window_8, softmax,
convolution, s4d.

Run:     python -m launch.train --config=configs/unified_long_sequence/moving_average.py:s4d
         --workdir=DIR
Data:    generated, no network
Cost:    ten seconds on two CPU cores
Expect:  test/squared_error within 10 % of the floor for the windows, below 0.00625 for window_8,
         convolution and s4d; softmax attention learns slowly where to look (0.012 with two heads)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("window_2", "window_4", "window_8", "softmax", "convolution", "s4d")
SPAN, LENGTH = 8, 32


def get_config(variant: str = "") -> Recipe:
    variant = variant or "softmax"
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    mixer, _, window = variant.partition("_")
    options = {"causal": True} | ({"window": int(window)} if window else {})
    source = {"name": "moving_average", "length": LENGTH, "span": SPAN, "distribution": "sign"}
    return Recipe(
        seed=0,
        steps=400,
        batch=64,
        model={
            "name": "sequence_mixer",
            "length": LENGTH,
            "channels": 1,
            "num_classes": 1,
            "dim": 32,
            "depth": 1,
            "num_heads": 8,  # as many kernels for mixers that have one for each head
            "mlp_ratio": 2.0,
            "mixer": mixer,
            "mixer_options": options,
            "bias": "learnt",
            "pool": "none",
        },
        task={"name": "position_regression"},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=5e-3, warmup=40, clip=1.0),
        evals={
            "test": Evaluation(data=Data(source={**source, "split": "test", "size": 2_048}),
                               batch=512)
        },
        checkpoint=Checkpoint(every=400, keep=1),
        report=Report(every=100, samples=0),
    )  # fmt: skip
