# SPDX-License-Identifier: Apache-2.0
"""A small PoinTr on boxes, cylinders, spheres and tori that are seen from one side.

The partial cloud is known, the half that faces away must be guessed. On the test set the partial
cloud alone has a chamfer distance of 57.3; joined with its reflection about the centre, about which
all four shapes are symmetric, 27.6, and an F-score of 0.89. Choose attention with
--config.model.encoder_attention=NAME, decoder_attention, cross_attention.

Run:     python -m launch.train --config=configs/cab/shapes.py --workdir=DIR
Data:    generated, no network
Cost:    one to two minutes on two CPU cores
Expect:  test/cd_l1 below 40 (37.0 measured), test/f_score above 0.75 (0.774 measured)
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    if variant:
        raise RecipeError(f"unknown variant {variant!r}: shapes.py has none")
    points, complete = 128, 512
    source = {"name": "parametric_shapes", "points": points, "complete_points": complete}
    return Recipe(
        seed=0,
        steps=400,
        batch=16,
        model={
            "name": "pointr",
            "points": points,
            "groups": (64, 32),
            "queries": 32,
            "fold": 3,
            "width": 64,
            "num_heads": 4,
            "global_width": 128,
            "depth": (2, 2),
        },
        task={"name": "completion", "complete_points": complete, "threshold": 0.05, "block": 256},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=2e-3, warmup=20, clip=1.0, weight_decay=5e-4),
        evals={
            "test": Evaluation(data=Data(source={**source, "split": "test", "size": 256}), batch=64)
        },
        checkpoint=Checkpoint(every=200, keep=1),
        report=Report(every=50, samples=0),
    )
