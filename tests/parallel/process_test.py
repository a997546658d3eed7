# SPDX-License-Identifier: Apache-2.0
"""Joining processes: detection, bad arguments, facts of one process."""

import pytest

from attnjax.errors import RecipeError
from attnjax.parallel import process


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TPU_WORKER_HOSTNAMES",
                 "MEGASCALE_NUM_SLICES", "KUBERNETES_SERVICE_HOST"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SLURM_NTASKS", "4", True),
        ("SLURM_NTASKS", "1", False),
        ("TPU_WORKER_HOSTNAMES", "a,b", True),
        ("TPU_WORKER_HOSTNAMES", "localhost", False),
    ],
)
def test_cluster_is_detected_from_the_environment(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    assert process.expects_cluster() is expected


@pytest.mark.parametrize("arguments", [("localhost:1", 0, -1), ("", 2, 0), ("localhost:1", 2, 2)])
def test_incomplete_arguments_are_refused(arguments):
    with pytest.raises(RecipeError, match="give all three"):
        process.initialise(*arguments)


def test_facts_of_one_process():
    assert process.gather_facts({"a": 1, "b": "x"}) == [{"a": 1, "b": "x"}]
    process.require_agreement({"a": 1})
    with pytest.raises(ValueError, match="16384"):
        process.gather_facts({"a": "x" * 20_000})


def test_disagreement_names_fact_and_processes(monkeypatch):
    monkeypatch.setattr(process, "gather_facts", lambda facts: [{"jax": "1"}, {"jax": "2"}])
    with pytest.raises(RecipeError, match=r"jax: process 0 1, process 1 2"):
        process.require_agreement({"jax": "1"})
