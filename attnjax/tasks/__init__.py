# SPDX-License-Identifier: Apache-2.0
"""Tasks bind a model, its loss and its metrics to the one contract the trainer knows."""

from attnjax.tasks.class_diffusion import ClassDiffusion
from attnjax.tasks.classification import Classification
from attnjax.tasks.completion import Completion
from attnjax.tasks.forecasting import Forecasting
from attnjax.tasks.language import LanguageModelling
from attnjax.tasks.masked_language import MaskedLanguageModelling
from attnjax.tasks.sequence import NextToken, PositionRegression
from attnjax.tasks.sequence_to_sequence import SequenceToSequence
from attnjax.tasks.speech import ParallelSpeech, StepwiseSpeech
from attnjax.tasks.super_resolution import SuperResolution
from attnjax.tasks.task import Task

__all__ = [
    "ClassDiffusion",
    "Classification",
    "Completion",
    "Forecasting",
    "LanguageModelling",
    "MaskedLanguageModelling",
    "NextToken",
    "ParallelSpeech",
    "PositionRegression",
    "SequenceToSequence",
    "StepwiseSpeech",
    "SuperResolution",
    "Task",
]
