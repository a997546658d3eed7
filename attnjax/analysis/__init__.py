# SPDX-License-Identifier: Apache-2.0
"""Analyses: what is measured of trained parameters and captured attention, as values."""
