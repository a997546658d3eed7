# SPDX-License-Identifier: Apache-2.0
"""Training: state, step, loop, checkpoints, guards, evaluation and reports."""
