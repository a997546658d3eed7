# SPDX-License-Identifier: Apache-2.0
"""What longer context is worth: the same recipe trained at several lengths of context.

    gain from context = score(longest) - score(shortest)

The statement that context helps "though depending on the application" is the paper's (arXiv
2302.06218, abstract); this measure of it is our design.
"""

import copy
import inspect
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from attnjax import registry
from attnjax.errors import Diverged, RecipeError
from attnjax.recipe import Recipe
from attnjax.train.loop import run as train
from attnjax.train.throughput import measure

CONTEXTS = {
    "quick": (16, 32, 64, 128),
    "standard": tuple(2**i for i in range(7, 12)),
    "long": tuple(2**i for i in range(7, 16)),
}
"""Named sets of context lengths."""


def with_context(recipe: Recipe, context: int) -> Recipe:
    """Return the recipe at another context: the model's length, and what its sources give.

    A source whose class takes `context` keeps its task and shows less of it; any other gives
    sequences of that `length`.

    Raises:
      RecipeError: the model or a source knows neither.
    """
    changed = copy.deepcopy(recipe)
    if (
        "length"
        not in inspect.signature(registry.resolve("model", recipe.model["name"])).parameters
    ):
        raise RecipeError(f"model {recipe.model['name']!r} has no length to change")
    changed.model["length"] = context
    for data in (changed.data, *(evaluation.data for evaluation in changed.evals.values())):
        source = registry.resolve("source", data.source["name"])
        known = inspect.signature(source).parameters
        field = next((name for name in ("context", "length") if name in known), None)
        if field is None:
            raise RecipeError(f"source {data.source['name']!r} takes neither context nor length")
        data.source[field] = context
    return changed.validate()


def run(
    recipe: Recipe,
    contexts: str | Sequence[int],
    path: pathlib.Path,
    *,
    seconds: float = 5.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train and time a recipe at every context and append records to a JSON-lines file.

    Args:
      recipe: a validated recipe whose `checkpoint.best` names the score (higher is better).
      contexts: key of `CONTEXTS`, or lengths, rising.
      path: file of records; contexts it holds for the same numbers are not trained again.
      seconds: time for measuring the speed of a step.
      say: called with one line per context.

    Returns:
      One record per context: `context`, `metric`, `score` (None if it diverged), `steps`,
      `seconds_per_step`, `temporary_bytes`, `parameters`, `device`, `recipe` (its digest).

    Raises:
      RecipeError: no score is named, or a context does not suit the recipe.
    """
    if isinstance(contexts, str):
        if contexts not in CONTEXTS:
            raise RecipeError(f"contexts {contexts!r}: {registry.nearest(contexts, CONTEXTS)}")
        contexts = CONTEXTS[contexts]
    metric = recipe.checkpoint.best
    if not metric:
        raise RecipeError("checkpoint.best is empty: it names the score of a sweep")
    recipes = {context: with_context(recipe, context) for context in contexts}
    lines = path.read_text().splitlines() if path.is_file() else []
    known = {record["recipe"]: record for record in map(json.loads, lines)}
    records = []
    for context, changed in recipes.items():
        record = known.get(changed.digest())
        if record is None:
            record = {"context": context, "metric": metric, **_measure(changed, metric, seconds)}
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        records.append(record)
        say(f"context {context}: {metric} {record['score']}, "
            f"{1e3 * record['seconds_per_step']:.1f} ms/step")  # fmt: skip
    return records


def _measure(recipe, metric, seconds):
    speed = measure(recipe, with_data=False, seconds=seconds)
    with tempfile.TemporaryDirectory(prefix="attnjax-context-") as folder:
        try:
            result = train(recipe, pathlib.Path(folder) / "run")
            if metric not in result.metrics:
                known = registry.nearest(metric, result.metrics)
                raise RecipeError(f"checkpoint.best={metric!r}: {known}")
            score = round(float(result.metrics[metric]), 6)
        except Diverged:
            score = None
    return {
        "score": score,
        "steps": recipe.steps,
        "seconds_per_step": speed["step"]["ours"]["median"],
        "temporary_bytes": speed["temporary_bytes"]["step"],
        "parameters": speed["parameters"],
        "device": speed["device"],
        "recipe": recipe.digest(),
    }


def gain(records: Sequence[dict[str, Any]]) -> float:
    """Return score(longest) - score(shortest); NaN if one of them diverged."""
    ordered = sorted(records, key=lambda record: record["context"])
    first, last = ordered[0]["score"], ordered[-1]["score"]
    return float("nan") if first is None or last is None else last - first


def render(records: Sequence[dict[str, Any]]) -> str:
    """Return a text table of a sweep and the gain from context."""
    metric = records[0]["metric"]
    lines = [f"{'context':>8}{metric:>20}{'ms/step':>12}{'temporary MiB':>16}"]
    for r in sorted(records, key=lambda record: record["context"]):
        score = "diverged" if r["score"] is None else f"{r['score']:.4f}"
        lines.append(
            f"{r['context']:8}{score:>20}{1e3 * r['seconds_per_step']:12.1f}"
            f"{r['temporary_bytes'] / 2**20:16.1f}"
        )
    return "\n".join([*lines, f"gain from context: {gain(records):+.4f}"])


def draw(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw score, seconds per step and memory over context into a PNG file."""
    import matplotlib.figure

    records = sorted(records, key=lambda record: record["context"])
    contexts = [record["context"] for record in records]
    panels = {
        records[0]["metric"]: [float("nan") if r["score"] is None else r["score"] for r in records],
        "ms/step": [1e3 * r["seconds_per_step"] for r in records],
        "temporary MiB": [r["temporary_bytes"] / 2**20 for r in records],
    }
    figure = matplotlib.figure.Figure((9, 2.8), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.plot(contexts, values, marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("context", fontsize=8)
        axes.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
