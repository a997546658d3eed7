# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays, one value per example or token."""

from attnjax.losses.classification import cross_entropy, soft_targets
from attnjax.losses.language import TokenLosses, token_losses

__all__ = ["TokenLosses", "cross_entropy", "soft_targets", "token_losses"]
