# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of arrays, one value per example."""

from attnjax.losses.classification import cross_entropy, soft_targets

__all__ = ["cross_entropy", "soft_targets"]
