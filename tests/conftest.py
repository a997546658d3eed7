# SPDX-License-Identifier: Apache-2.0
"""Test set-up: eight virtual CPU devices, every warning an error."""

import os
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax

jax.config.update("jax_num_cpu_devices", 8)

warnings.simplefilter("error")
