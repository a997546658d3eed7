# SPDX-License-Identifier: Apache-2.0
"""The smallest recipe that has everything a fault can hit: dropout, averaging, accumulation.

The variant `faulty` reads the source of `faulty.py`, which only that launcher knows; `evaluated`
has a test set.

Run:     python -m launch.train --config=tests/faults/tiny.py --workdir=DIR
Data:    made on the fly
"""

from attnjax.recipe import Checkpoint, Data, Evaluation, Mesh, Optim, Recipe, Report


def get_config(variant: str = "") -> Recipe:
    name = "faulty" if variant == "faulty" else "information_exchange"
    test = Data(source={"name": name, "seed": 3, "split": "test", "size": 40})
    evals = {"test": Evaluation(data=test, every=2)} if variant == "evaluated" else {}
    return Recipe(
        seed=1,
        steps=12,
        batch=16,
        model={
            "name": "crossvit",
            "num_classes": 2,
            "image_size": (16, 16),
            "patch_size": (4, 8),
            "dims": (16, 32),
            "depth": ((1, 1, 0),),
            "num_heads": (4, 4),
            "mlp_ratio": (2.0, 2.0),
            "stem": "patches",
            "drop_path": 0.2,
        },
        task={"name": "classification"},
        data=Data(source={"name": name, "seed": 3}),
        optim=Optim(lr=1e-3, ema=0.9, accumulate=2),
        mesh=Mesh(data=-1),
        evals=evals,
        checkpoint=Checkpoint(every=2, keep=3),
        report=Report(every=1, tensorboard=False, samples=0),
    )
