# SPDX-License-Identifier: Apache-2.0
"""Failures a user can act on, each with the exit code that launchers return for it."""

DONE = 0
FAILED = 1
CLAIM_MISSED = 6
"""`launch.claims` measured the claim and it does not hold."""


class AttnjaxError(Exception):
    """Base of all expected failures: launchers print one line, without a traceback."""

    exit_code = FAILED


class RecipeError(AttnjaxError, ValueError):
    """A recipe, flag or data path cannot work; raised before anything is compiled or written."""

    exit_code = 2


class Preempted(AttnjaxError):
    """A signal asked the run to stop; it saved its state and can be resumed."""

    exit_code = 3


class NoUsableCheckpoint(AttnjaxError):
    """Checkpoints exist, and none of them can be restored."""

    exit_code = 4


class Diverged(AttnjaxError):
    """Too many steps in a row had a non-finite or exploding loss."""

    exit_code = 5
