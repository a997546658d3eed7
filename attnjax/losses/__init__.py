# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays, one value per example or token."""

from attnjax.losses.classification import cross_entropy, soft_targets
from attnjax.losses.language import TokenLosses, token_losses
from attnjax.losses.points import chamfer_l1, chamfer_l2
from attnjax.losses.speech import (
    duration_error,
    end_error,
    mean_error,
    mel_error,
    squared_error,
)

__all__ = [
    "TokenLosses",
    "chamfer_l1",
    "chamfer_l2",
    "cross_entropy",
    "duration_error",
    "end_error",
    "mean_error",
    "mel_error",
    "soft_targets",
    "squared_error",
    "token_losses",
]
