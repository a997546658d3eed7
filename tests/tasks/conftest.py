# SPDX-License-Identifier: Apache-2.0
"""What tests of tasks share."""

import jax
import pytest


@pytest.fixture
def quick():
    """Compile without optimising: compiling well takes longer than two steps."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
