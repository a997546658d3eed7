# SPDX-License-Identifier: Apache-2.0
"""The Long Range Arena's tasks with any mixer; the variant is a task, then options.

Tasks: listops, text, retrieval, image, pathfinder, path_x on files of the Arena, and
listops_generated, pathfinder_generated, which need none. Options: big (6 layers of 512 instead of
4 of 128). The mixer is --config.model.mixer=NAME. Optimiser, steps and sizes are our design: the
paper's were not available.

Run:     python -m launch.train --config=configs/unified_long_sequence/lra.py:listops,big
         --workdir=DIR --config.data.source.root=ROOT --config.evals.test.data.source.root=ROOT
         --config.model.mixer=s4d
Data:    lra_release as its authors packed it (listops: basic_{train,val,test}.tsv; retrieval:
         new_aan_pairs.{train,eval,test}.tsv; pathfinder: metadata/*.npy and pictures), IMDb
         folders, CIFAR-10 in its binary version
Cost:    not run by us; 10,000 to 50,000 steps on one GPU
Expect:  no numbers of the paper are known; chance is 0.1 (listops, image) or 0.5
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

# Source, its arguments, fields of the model, steps.
TASKS = {
    "listops": ("lra_listops", {"root": ""}, {"length": 2_000, "vocab": 16}, 10_000),
    "text": ("lra_text", {"root": ""}, {"length": 4_096, "vocab": 257}, 20_000),
    "retrieval": (
        "lra_retrieval", {"root": ""}, {"length": 4_000, "vocab": 257, "pool": "pair"}, 10_000,
    ),
    "image": ("lra_image", {"root": ""}, {"length": 1_024, "vocab": 257}, 50_000),
    "pathfinder": ("lra_pathfinder", {"root": "", "side": 32}, {"length": 1_024}, 50_000),
    "path_x": ("lra_pathfinder", {"root": "", "side": 128}, {"length": 16_384}, 50_000),
    "listops_generated": ("listops", {}, {"length": 2_000, "vocab": 16}, 10_000),
    "pathfinder_generated": ("pathfinder", {"side": 32}, {"length": 1_024}, 50_000),
}  # fmt: skip
CLASSES = {"listops": 10, "listops_generated": 10, "image": 10}
VARIANTS = tuple(TASKS)
OPTIONS = ("big",)


def get_config(variant: str = "") -> Recipe:
    task, *options = (variant or "listops_generated").split(",")
    if task not in TASKS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(task, TASKS)}")
    for option in options:
        if option not in OPTIONS:
            raise RecipeError(f"unknown option {option!r}: {nearest(option, OPTIONS)}")
    name, arguments, fields, steps = TASKS[task]
    source = {"name": name, **arguments}
    held_out = {"size": 2_000} if task.endswith("generated") else {}
    return Recipe(
        seed=0,
        steps=steps,
        batch=32,
        model={
            "name": "sequence_mixer",
            "preset": "big" if "big" in options else "small",
            "num_classes": CLASSES.get(task, 2),
            "mixer": "softmax",
            "mixer_options": {},
            "dropout": 0.1,
            **fields,
        },
        task={"name": "classification"},
        data=Data(source={**source, "split": "train"}, workers=4),
        optim=Optim(
            lr=3e-4,  # 1e-3 for mixers without attention
            warmup=steps // 20,
            weight_decay=0.05,
            no_decay=("random_projection$",),
        ),
        evals={
            "test": Evaluation(
                data=Data(source={**source, "split": "test", **held_out}), every=steps // 10
            )
        },
        checkpoint=Checkpoint(every=steps // 10, keep=2, best="test/accuracy"),
        report=Report(every=100, samples=0),
    )
