# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: data, the protocol of what is measured, scoring. They know no model class."""

SUITES = {
    "attention": "attnjax.benchmarks.attention",
    "cab": "attnjax.train.cab_board",
    "long_context": "attnjax.benchmarks.long_context.suite",
    "mixers": "attnjax.benchmarks.long_sequence",
    "scale_factor": "attnjax.benchmarks.scale_factor",
}
"""Name -> module with `grid`, `names`, `run`, `draw` and `render`: cells of a resumable table. That
of CAB lies above the others, since it trains."""
