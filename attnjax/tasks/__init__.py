# SPDX-License-Identifier: Apache-2.0
"""Tasks bind a model, its loss and its metrics to the one contract the trainer knows."""

from attnjax.tasks.classification import Classification
from attnjax.tasks.language import LanguageModelling
from attnjax.tasks.sequence import NextToken, PositionRegression
from attnjax.tasks.super_resolution import SuperResolution
from attnjax.tasks.task import Task

__all__ = [
    "Classification",
    "LanguageModelling",
    "NextToken",
    "PositionRegression",
    "SuperResolution",
    "Task",
]
