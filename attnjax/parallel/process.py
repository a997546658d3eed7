# SPDX-License-Identifier: Apache-2.0
"""Start-up and agreement of the processes of one run."""

import contextlib
import glob
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from attnjax.errors import AttnjaxError, RecipeError

_log = logging.getLogger(__name__)

_CLUSTER_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_MAX_FACTS = 16_384
_MAX_PROBLEM = 2_000
_LISTED = 10


def expects_cluster() -> bool:
    """Tell from the environment whether this process is one of several (Slurm, MPI, GKE, TPU)."""
    if any(os.environ.get(name, "1") not in ("", "1") for name in _CLUSTER_COUNTS):
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in os.environ:
        return True
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return True
    on_tpu = os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return on_tpu and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def initialise(coordinator: str = "", process_count: int = 0, process_id: int = -1) -> None:
    """Join the processes of the run; a no-op for a single process.

    With no arguments the cluster is detected by `jax.distributed` (Slurm, MPI, GKE, TPU pods). Must
    run before anything touches a device.

    Args:
      coordinator: "host:port" of process 0; empty to detect.
      process_count: number of processes, with `coordinator`.
      process_id: index of this process, with `coordinator`.

    Raises:
      RecipeError: only some of the three were given.
    """
    if coordinator or process_count or process_id >= 0:
        if not coordinator or process_count < 1 or not 0 <= process_id < process_count:
            raise RecipeError(
                f"coordinator={coordinator!r}, process_count={process_count}, "
                f"process_id={process_id}: give all three, with 0 <= process_id < process_count"
            )
        jax.distributed.initialize(coordinator, process_count, process_id)
    elif expects_cluster():
        try:
            jax.distributed.initialize()
        except ValueError as error:
            # Raised on a single TPU host or in an interactive Slurm shell: nobody to join.
            _log.info("running as a single process: %s", error)


def gather_facts(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the facts (JSON values) that every process passed, in process order.

    Raises:
      ValueError: the facts take more than 16 KiB.
    """
    text = json.dumps(facts, sort_keys=True).encode()
    if len(text) > _MAX_FACTS:
        raise ValueError(f"facts take {len(text)} bytes, at most {_MAX_FACTS} are gathered")
    if jax.process_count() == 1:
        return [json.loads(text)]
    padded = np.zeros(_MAX_FACTS, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row).rstrip(b"\0")) for row in np.asarray(rows)]


def require_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse to start when processes disagree on any fact.

    Args:
      facts: JSON values, nested or not, that must be equal everywhere (recipe, versions, sizes).

    Raises:
      RecipeError: on every process, with the differing values and the first process of each.
    """
    _compare([_flatten(row) for row in gather_facts(facts)])


@contextlib.contextmanager
def together() -> Iterator[dict[str, Any]]:
    """Run a part of the start-up in which any process may fail alone: all refuse, or none does.

    A process that gave up on its own would leave the others waiting in their next collective.

    Yields:
      A dict to fill with JSON values that must be equal everywhere.

    Raises:
      AttnjaxError: what this process raised itself.
      RecipeError: another process failed, or processes disagree on a fact.
    """
    facts: dict[str, Any] = {}
    problem = None
    try:
        yield facts
    except AttnjaxError as error:
        problem = error
    if jax.process_count() > 1:
        text = "" if problem is None else str(problem)[:_MAX_PROBLEM] or type(problem).__name__
        rows = gather_facts({"problem": text, "facts": {} if problem else facts})
        others = [f"process {i}: {row['problem']}" for i, row in enumerate(rows) if row["problem"]]
        if others and problem is None:
            raise RecipeError("; ".join(others[:_LISTED]))
        if not others:
            _compare([_flatten(row["facts"]) for row in rows])
    if problem is not None:
        raise problem


def _compare(rows: list[dict[str, Any]]) -> None:
    lines = []
    for name in sorted({name for row in rows for name in row}):
        first: dict[str, int] = {}
        for process, row in enumerate(rows):
            first.setdefault(str(row.get(name)), process)
        if len(first) > 1:
            values = ", ".join(f"process {process} {value}" for value, process in first.items())
            lines.append(f"{name}: {values}")
    if lines:
        more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise RecipeError("processes disagree: " + "; ".join(lines[:_LISTED]) + more)


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
