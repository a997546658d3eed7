# SPDX-License-Identifier: Apache-2.0
"""FastSpeech 2 with any attention: tones whose durations, pitch and energy are known, or LJSpeech.

The attention is --config.model.attention=NAME. Variants: "tones" (the default), in which all that
is to be predicted follows from the phonemes; "ljspeech", the model and settings of CAB
(arXiv 2210.07661, with softmax MCD 3.475 and MSD 1.974 on the test chapters).

Run:     python -m launch.train --config=configs/cab/fastspeech2.py --workdir=DIR
Data:    generated; for :ljspeech, LJSpeech-1.1 under data/LJSpeech-1.1 and alignments of its
         phonemes (lines id|phonemes|frames) as its alignments.txt; take task.mel_mean and
         task.mel_deviation from attnjax.data.speech.mel_statistics, and model.variance.pitch and
         energy, ends of their ranges, from the examples
Cost:    1 minute on two CPU cores; :ljspeech was not run by us
Expect:  test/mcd 3.08, test/msd 1.46 and test/frames 1.0, measured once; the mean frame, as often
         as it should be, has 5.69 and 2.55
"""

from attnjax.errors import RecipeError
from attnjax.recipe import Checkpoint, Data, Evaluation, Optim, Recipe, Report
from attnjax.registry import nearest

VARIANTS = ("tones", "ljspeech")


def get_config(variant: str = "") -> Recipe:
    variant = variant or VARIANTS[0]
    if variant not in VARIANTS:
        raise RecipeError(f"unknown variant {variant!r}: {nearest(variant, VARIANTS)}")
    return _tones() if variant == "tones" else _ljspeech()


def _tones() -> Recipe:
    source = {"name": "synthetic_speech", "length": 10, "frames": 64, "alphabet": 12}
    return Recipe(
        seed=0,
        steps=1_000,
        batch=16,
        model={
            "name": "fastspeech2",
            "vocab_size": 16,
            "length": 10,
            "frames": 64,
            "width": 64,
            "depths": (2, 2),
            "hidden": 128,
            "kernel": 3,
            "variance": {"width": 64, "dropout": 0.0},
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        task={"name": "parallel_speech", "mel_mean": -4.7, "mel_deviation": 2.5},
        data=Data(source={**source, "split": "train"}),
        optim=Optim(lr=2e-3, warmup=30, clip=5.0),
        evals={
            "test": Evaluation(data=Data(source={**source, "split": "test", "size": 32}), batch=16)
        },
        checkpoint=Checkpoint(every=1_000, keep=1),
        report=Report(every=200, samples=0),
    )


def _ljspeech() -> Recipe:
    root = "data/LJSpeech-1.1"
    source = {"name": "lj_speech", "root": root, "alignments": f"{root}/alignments.txt"}
    return Recipe(
        seed=1,
        steps=200_000,
        batch=48,
        model={"name": "fastspeech2", "preset": "cab"},
        task={"name": "parallel_speech", "mel_mean": -5.5, "mel_deviation": 2.1},
        data=Data(source={**source, "split": "train"}, workers=4),
        optim=Optim(lr=5e-4, warmup=4_000, decay="inverse_sqrt", clip=5.0, accumulate=8),
        evals={
            "dev": Evaluation(data=Data(source={**source, "split": "dev"}), every=10_000, batch=8),
            "test": Evaluation(data=Data(source={**source, "split": "test"}), batch=8),
        },
        checkpoint=Checkpoint(every=5_000, keep=5),
        report=Report(every=100, samples=0),
    )
