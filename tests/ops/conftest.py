# SPDX-License-Identifier: Apache-2.0
"""Programs here are many and small: optimising them takes longer than running them."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
