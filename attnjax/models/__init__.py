# SPDX-License-Identifier: Apache-2.0
"""One published model per file; `load` builds any of them by name."""

from attnjax.models.load import build, load

__all__ = ["build", "load"]
