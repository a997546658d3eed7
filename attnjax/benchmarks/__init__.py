# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: data, the protocol of what is measured, scoring. They know no model class."""
