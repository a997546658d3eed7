# SPDX-License-Identifier: Apache-2.0
"""Measure a claim: train or measure every arm with every seed, and judge."""

import importlib.metadata
import math
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import attnjax
from attnjax import claim as claim_lib
from attnjax.errors import Diverged
from attnjax.train.loop import run

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def measure(
    slug: str,
    seeds: int = 0,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the claim of a system and return its record.

    Runs happen in temporary folders, one after another; a run that diverges measures NaN.

    Args:
      slug: a registered system that states a claim.
      seeds: number of seeds; 0 takes the claim's own.
      command: what to record as the command that made this measurement.
      say: called with one line of progress per run.

    Returns:
      A JSON-ready dict: `system`, `claim`, `baseline`, `effect`, `spread`, `seeds`, `per_seed`,
      `mean`, `conditions`, `holds`, `command`, `versions`, `seconds`.

    Raises:
      RecipeError: the system, its claim or one of its recipes is wrong.
    """
    claim = claim_lib.load(slug).validate()
    count = seeds or claim.seeds
    start = time.monotonic()
    per_seed: dict[str, list[float]] = {name: [] for name in claim.arms}
    for seed in range(count):
        known: dict[str, dict[str, float]] = {}
        for name, arm in claim.arms.items():
            value = _measure_arm(arm, seed, known)
            per_seed[name].append(value)
            say(
                f"{slug} seed {seed} {name}: {arm.metric} {value:.4f} "
                f"({time.monotonic() - start:.0f} s since the start)"
            )
    record = {
        "system": slug,
        "claim": claim.statement,
        "baseline": claim.baseline,
        **claim_lib.judge(claim, per_seed),
        "effect_of": claim.effect,
        "seeds": list(range(count)),
        "per_seed": per_seed,
        "command": command,
        "versions": {
            "attnjax": attnjax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
        "seconds": round(time.monotonic() - start, 1),
    }
    return _strict(record)


def _strict(value):
    """Replace NaN by None: JSON knows no NaN, and other readers would stumble over it."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _measure_arm(arm, seed: int, known: dict[str, dict[str, float]]) -> float:
    """Return an arm's number; arms that read several of one run find it in `known`."""
    if isinstance(arm, claim_lib.Measurement):
        return round(float(arm.make()(seed)), 6)
    recipe = arm.recipe(seed)
    metrics = known.get(recipe.digest())
    if metrics is None:
        with tempfile.TemporaryDirectory(prefix="attnjax-claim-") as folder:
            try:
                metrics = run(recipe, pathlib.Path(folder) / "run").metrics
            except Diverged:
                metrics = {}
        known[recipe.digest()] = metrics
    return round(float(metrics[arm.metric]), 6) if metrics else math.nan
