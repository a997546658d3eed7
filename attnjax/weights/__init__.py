# SPDX-License-Identifier: Apache-2.0
"""Parameters on disk: safetensors only, explicit names, nothing half-loaded.

read, write        safetensors files within a budget
import_params      a published or own layout -> parameters
export_params      parameters -> a published or own layout
Rule, plan         the table that relates both
"""

from attnjax.weights.files import Budget, read, write
from attnjax.weights.names import (
    NATIVE,
    Rule,
    export_params,
    flatten,
    import_params,
    layout_of,
    plan,
    unflatten,
)

__all__ = [
    "NATIVE",
    "Budget",
    "Rule",
    "export_params",
    "flatten",
    "import_params",
    "layout_of",
    "plan",
    "read",
    "unflatten",
    "write",
]
