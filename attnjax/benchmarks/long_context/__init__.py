# SPDX-License-Identifier: Apache-2.0
"""LongCA-bench: masks x kernels x context-parallel attentions x lengths x devices."""
