# SPDX-License-Identifier: Apache-2.0
"""Joining processes: detection, bad arguments, facts of one process."""

import pytest

from attnjax.errors import AttnjaxError, RecipeError
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


def test_differences_name_path_and_first_process_of_each_value(
    monkeypatch,
):
    rows = [{"recipe": {"optim": {"lr": lr}, "steps": 5}} for lr in (1, 1, 2, 2)]
    monkeypatch.setattr(process, "gather_facts", lambda facts: rows)
    with pytest.raises(RecipeError) as error:
        process.require_agreement(rows[0])
    assert str(error.value) == "processes disagree: recipe.optim.lr: process 0 1, process 2 2"


def test_many_differences_are_cut(monkeypatch):
    rows = [{f"f{i:02d}": i for i in range(15)}, {}]
    monkeypatch.setattr(process, "gather_facts", lambda facts: rows)
    with pytest.raises(RecipeError, match=r"f09: process 0 9, process 1 None; and 5 more$"):
        process.require_agreement(rows[0])


def test_alone_a_part_fails_as_it_would_anyway():
    with process.together() as facts:
        facts["size"] = "x" * 20_000  # Facts are gathered from several processes only.
    with pytest.raises(AttnjaxError, match="mine") as error, process.together():
        raise AttnjaxError("mine")
    assert error.value.exit_code == 1


class Peer:
    """The answer of another process to `gather_facts`; records what this one said."""

    def __init__(self, monkeypatch, answer):
        self.said = None
        self.answer = answer
        monkeypatch.setattr(process.jax, "process_count", lambda: 2)
        monkeypatch.setattr(process, "gather_facts", self.gather)

    def gather(self, facts):
        self.said = facts
        return [facts, self.answer]


def test_all_refuse_what_one_cannot_do(monkeypatch):
    Peer(monkeypatch, {"problem": "no such folder", "facts": {}})
    with (
        pytest.raises(RecipeError, match=r"^process 1: no such folder$"),
        process.together() as facts,
    ):
        facts["size"] = 5


def test_this_process_tells_the_others_and_keeps_its_own_error(monkeypatch):
    peer = Peer(monkeypatch, {"problem": "", "facts": {"size": 5}})
    with pytest.raises(AttnjaxError, match=r"^mine$") as error, process.together() as facts:
        facts["size"] = 6
        raise AttnjaxError("mine")
    assert error.value.exit_code == 1
    assert peer.said == {"problem": "mine", "facts": {}}


def test_facts_of_a_part_are_compared(monkeypatch):
    Peer(monkeypatch, {"problem": "", "facts": {"examples": {"data": 5}}})
    message = r"examples\.data: process 0 6, process 1 5"
    with pytest.raises(RecipeError, match=message), process.together() as facts:
        facts["examples"] = {"data": 6}
