# SPDX-License-Identifier: Apache-2.0
"""The loader's own speed is measured per worker count."""

from attnjax.data import throughput
from attnjax.recipe import Data


def test_one_measurement_per_worker_count():
    data = Data({"name": "information_exchange"}, workers=0, prefetch=1)
    (own,) = throughput.measure(data, 8, seconds=0.05)
    assert (own.workers, own.batch, own.prefetch) == (0, 8, 1)
    assert own.examples_per_second > 10 and own.first_batch_seconds > 0
    (other,) = throughput.measure(data, 8, workers=[1], seconds=0.05)
    assert other.workers == 1 and other.examples_per_second > 10
