# SPDX-License-Identifier: Apache-2.0
"""Test set-up: eight virtual CPU devices, every warning an error, little optimisation by XLA.

Most of the time of the default tests is compilation, and half of that LLVM's optimisation of
programs that run once. `XLA_FLAGS= pytest` optimises as for users; `make test-slow` does.
"""

import os
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)

warnings.simplefilter("error")
