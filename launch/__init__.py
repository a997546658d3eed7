# SPDX-License-Identifier: Apache-2.0
"""Command-line programs: each parses flags, builds a recipe and calls one function."""
