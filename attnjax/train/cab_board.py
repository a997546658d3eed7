# SPDX-License-Identifier: Apache-2.0
"""CAB's leaderboard: every attention trained on every task of the patterns that it has.

    cell = (pattern, task, attention) -> metrics of the task's recipe, trained with that attention
    CI   = compositional index of an attention in a pattern, mu and sigma over the attentions here

Zhang et al., arXiv 2210.07661. Each pattern has a task with a known answer and, where there is data
on every machine, a real one. Cells are appended to `cells.jsonl` as they end, under the digest of
their recipe, and are not trained again while that stays the same. The grids of
`benchmarks.cab.efficiency` measure cost instead.
"""

import csv
import dataclasses
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from attnjax import recipe as recipe_lib
from attnjax.benchmarks import turns
from attnjax.benchmarks.cab import correlation, efficiency, index
from attnjax.benchmarks.cab.index import Metric
from attnjax.claim import override
from attnjax.data.iterator import eval_batches
from attnjax.errors import Diverged
from attnjax.metrics.state import compute, merge
from attnjax.ops.efficient import ATTENTIONS, CONTROLS, PATTERNS
from attnjax.recipe import Recipe
from attnjax.train.loop import run as train
from attnjax.train.program import build_task
from attnjax.typing import Params

OK, DIVERGED = turns.OK, "diverged"

CONTROL = "none"
"""Attention that returns zeros: what the others must beat."""

REFERENCE, SHARE = "softmax", 0.1
"""An attention may add this share of the parameters of the model with softmax attention."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a pattern.

    Attributes:
      pattern: member of `ops.efficient.PATTERNS`.
      name: unique within the pattern.
      config: recipe.
      field: of the model, the attention that is exchanged; others stay as they are.
      metrics: name in the final metrics of a run -> +1 where more is better, -1 where less is.
    """

    pattern: str
    name: str
    config: str
    field: str
    metrics: Mapping[str, int]


TASKS = (
    Task(
        "noncausal_self", "permutation", "configs/cab/window_permutation.py", "attention",
        {"test/accuracy": 1},
    ),
    Task(
        "noncausal_self", "masked_language", "configs/cab/masked_language_model.py", "attention",
        {"validation/perplexity": -1},
    ),
    Task(
        "noncausal_self", "super_resolution", "configs/cab/sr3_digits.py", "attention",
        {"test/psnr": 1, "test/ssim": 1},
    ),
    Task(
        "causal_self", "recall", "configs/cab/associative_recall.py", "attention",
        {"test/accuracy": 1},
    ),
    Task(
        "causal_self", "language", "configs/cab/language_model.py", "attention",
        {"test/perplexity": -1},
    ),
    Task(
        "noncausal_cross", "forecasting", "configs/cab/seasonal_series.py", "cross_attention",
        {"test/mse": -1, "test/mae": -1},
    ),
    Task(
        "noncausal_cross", "lag", "configs/cab/lagged_series.py", "cross_attention",
        {"test/mse": -1, "test/mae": -1},
    ),
    Task(
        "causal_cross", "sorting", "configs/cab/copy_sort.py:sort", "cross_attention",
        {"test/accuracy": 1},
    ),
)  # fmt: skip

OPTIONS: dict[tuple[str, str], dict[str, int]] = {
    ("local", "causal_self"): {"window": 16},
    ("long_short", "causal_self"): {"window": 16, "chunk": 4, "memory": 32},
}
"""Where the attentions' own defaults are longer than the sequences here."""

SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "permutation": {"steps": 200},
        "masked_language": {"steps": 100},
        "super_resolution": {"steps": 60, "batch": 16, "task.sample_steps": 5},
        "language": {"steps": 100},
        "forecasting": {"steps": 200},
        "lag": {"steps": 300},
        "sorting": {"steps": 200},
    },
    "standard": {},
}
"""Name -> task -> what differs from the recipe, by dotted path."""

LANGUAGE_LENGTHS = (32, 64)
"""Lengths at which the language models are tried besides that of training. Longer ones have no
positions in GPT-2's table."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attention on one task.

    Attributes:
      task: the task.
      attention: key of `ATTENTIONS` or `CONTROLS`.
      scale: key of `SCALES`.
    """

    task: Task
    attention: str
    scale: str

    @property
    def name(self) -> str:
        """Such as "causal_self/recall/local"."""
        return f"{self.task.pattern}/{self.task.name}/{self.attention}"

    def recipe(self) -> Recipe:
        """Return the validated recipe."""
        recipe = recipe_lib.load(self.task.config)
        options = OPTIONS.get((self.attention, self.task.pattern), {})
        recipe.model[self.task.field] = {"name": self.attention, **options}
        for path, value in SCALES[self.scale].get(self.task.name, {}).items():
            override(recipe, path, value)
        recipe.checkpoint.every = recipe.steps
        recipe.report.tensorboard = False
        return recipe.validate()


def perplexities(recipe: Recipe, params: Params) -> dict[str, float]:
    """Return perplexities of a language model at `LANGUAGE_LENGTHS`, "length_N/perplexity"."""
    task, found = build_task(recipe), {}
    step = jax.jit(task.evaluate)
    for length in LANGUAGE_LENGTHS:
        data = recipe.evals["test"].data
        data = dataclasses.replace(data, source={**data.source, "length": length})
        states = None
        for rows in eval_batches(data, recipe.batch):
            states = merge(states, step(params, {k: rows[k] for k in (*task.inputs, "valid")}))
        found[f"length_{length}/perplexity"] = compute(states)["perplexity"]
    return found


def grid(name: str, only: str = "") -> list[Any]:
    """List cells of the leaderboard, or of costs.

    Args:
      name: key of `SCALES`, or of `efficiency.GRIDS`.
      only: regular expression searched in names of cells.

    Returns:
      Cells, or what `efficiency.grid` returns.

    Raises:
      ValueError: the name is unknown, or nothing is left.
    """
    if name in efficiency.GRIDS:
        return list(efficiency.grid(name, only))
    if name not in SCALES:
        raise ValueError(f"shapes {name!r} are unknown; choose from {[*SCALES, *efficiency.GRIDS]}")
    cells = [
        Cell(task, attention, name)
        for task in TASKS
        for attention, family in (ATTENTIONS | CONTROLS).items()
        if task.pattern in family.patterns
    ]
    pattern = turns.matcher(only)
    found = [cell for cell in cells if pattern.search(cell.name)]
    if not found:
        raise ValueError(f"only={only!r} matches no cell such as {cells[0].name!r}")
    return found


def names(cases: Iterable[Any]) -> list[str]:
    """Return the names of all cells."""
    return [cell.name for case in cases for cell in (case if isinstance(case, tuple) else (case,))]


def run(
    cases: Sequence[Any],
    path: pathlib.Path,
    *,
    budget: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train cells, or measure costs, that the folder does not hold yet.

    Args:
      cases: from `grid`.
      path: CSV file of the leaderboard, or of costs. Beside the leaderboard lie `cells.jsonl` and
        `leaderboard.md`.
      budget: seconds for each series of costs; training ends when its steps do.
      say: called with one line per cell.

    Returns:
      Rows of costs; or the records of these cells, old and new: `pattern`, `task`, `attention`,
      `scale`, `status`, `metrics`, `steps`, `seconds`, `parameters`, `recipe` (its digest) and the
      machine's.
    """
    if isinstance(cases[0], tuple):
        return efficiency.run(cases, path, budget=budget, say=say)
    store = path.with_name("cells.jsonl")
    lines = store.read_text().splitlines() if store.is_file() else []
    known = {(r["name"], r["recipe"]): r for r in map(json.loads, lines)}
    records = []
    for cell in cases:
        recipe = cell.recipe()
        record = known.get((cell.name, recipe.digest()))
        if record is None:
            record = _train(cell, recipe)
            with store.open("a") as file:
                file.write(json.dumps(record) + "\n")
            shown = ", ".join(f"{k} {_show(v)}" for k, v in record["metrics"].items())
            say(f"{cell.name}: {shown or record['status']} ({record['seconds']} s)")
        records.append(record)
    write(records, path)
    return records


def _train(cell, recipe):
    begun = time.monotonic()
    status, metrics, parameters = OK, {}, None
    with tempfile.TemporaryDirectory(prefix="attnjax-cab-") as folder:
        try:
            result = train(recipe, pathlib.Path(folder) / "run")
        except Diverged:
            status = DIVERGED
        else:
            metrics = {name: result.metrics[name] for name in cell.task.metrics}
            if cell.task.name == "language":
                metrics |= perplexities(recipe, result.state.averaged)
            metrics = {name: round(float(value), 6) for name, value in metrics.items()}
            parameters = sum(x.size for x in jax.tree.leaves(result.state.params))
    return {
        "name": cell.name,
        "pattern": cell.task.pattern,
        "task": cell.task.name,
        "attention": cell.attention,
        "scale": cell.scale,
        "status": status,
        "metrics": metrics,
        "steps": recipe.steps,
        "seconds": round(time.monotonic() - begun, 1),
        "parameters": parameters,
        "recipe": recipe.digest(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


@dataclasses.dataclass(frozen=True)
class Standing:
    """How one attention does in one pattern.

    Attributes:
      pattern, attention: which.
      index: compositional index and its parts, tasks.
      values: "task/metric" -> value.
    """

    pattern: str
    attention: str
    index: index.Index
    values: dict[str, float]


def standings(records: Iterable[Mapping[str, Any]]) -> list[Standing]:
    """Return all standings, by pattern, best first.

    Args:
      records: of `run`. Mean and deviation of a metric are over attentions, without controls.
    """
    records = list(records)
    found = []
    for pattern in PATTERNS:
        tasks = {
            task.name: tuple(
                Metric(f"{task.name}/{metric}", sign) for metric, sign in task.metrics.items()
            )
            for task in TASKS
            if task.pattern == pattern
        }
        known = {metric.name for metrics in tasks.values() for metric in metrics}
        rows: dict[str, dict[str, float]] = {}
        for record in records:
            if record["pattern"] == pattern and record["status"] == OK:
                named = {f"{record['task']}/{k}": v for k, v in record["metrics"].items()}
                row = rows.setdefault(record["attention"], {})
                row |= {name: value for name, value in named.items() if name in known}
        measured = index.estimate(
            {name: row for name, row in rows.items() if name not in CONTROLS}, tasks
        )
        kept = {metric.name for metrics in measured.values() for metric in metrics}
        standing = [
            Standing(
                pattern,
                name,
                index.score({k: v for k, v in row.items() if k in kept}, measured),
                row,
            )
            for name, row in rows.items()
        ]
        found += sorted(standing, key=lambda s: (math.isnan(s.index.total), -s.index.total))
    return found


def write(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Write the leaderboard: a CSV file with a line per number, and `leaderboard.md` beside it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("pattern", "attention", "quantity", "value"))
        for row in standings(records):
            writer.writerow((row.pattern, row.attention, "index", _show(row.index.total)))
            for task, value in row.index.tasks.items():
                writer.writerow((row.pattern, row.attention, f"index/{task}", _show(value)))
            for name, value in row.values.items():
                writer.writerow((row.pattern, row.attention, name, value))
    path.with_name("leaderboard.md").write_text(render(records) + "\n")


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the leaderboard in Markdown, or the text table of costs."""
    if records and "task" not in records[0]:
        return efficiency.render(records)
    rows = standings(records)
    lines = []
    for pattern in PATTERNS:
        here = [row for row in rows if row.pattern == pattern]
        if not here:
            continue
        columns = list(dict.fromkeys(name for row in here for name in row.values))
        tasks = list(dict.fromkeys(task for row in here for task in row.index.tasks))
        head = ("attention", "index", *(f"index {t}" for t in tasks), *columns)
        lines += [f"### {pattern.replace('_', ' ')}", "", *_head(head)]
        for row in here:
            indices = (row.index.total, *(row.index.tasks.get(t, math.nan) for t in tasks))
            values = (row.values.get(name, math.nan) for name in columns)
            cells = (*map(_show, indices), *map(_show, values))
            lines.append("| " + " | ".join((row.attention, *cells)) + " |")
        lines.append("")
    lines += _benefit(rows) + _correlations(rows) + _lengths(records) + _notes(records)
    return "\n".join(lines).rstrip()


def _head(columns):
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def _benefit(rows):
    """What is lost without attention, task by task, in deviations of the attentions."""
    without = {row.pattern: row.index.tasks for row in rows if row.attention == CONTROL}
    found = [
        (row, correlation.benefits(row.index.tasks, without[row.pattern]))
        for row in rows
        if row.pattern in without and row.attention != CONTROL
    ]
    found = [(row, gains) for row, gains in found if gains]
    if not found:
        return []
    lines = ["### benefit of attention: index less that without attention", ""]
    lines += _head(("pattern", "attention", "benefit"))
    for row, gains in found:
        text = ", ".join(f"{task} {_show(gain)}" for task, gain in gains.items())
        lines.append(f"| {row.pattern} | {row.attention} | {text} |")
    return [*lines, ""]


def _correlations(rows):
    """Pearson's coefficients between patterns and between tasks, controls left out."""
    patterns: dict[str, dict[str, float]] = {}
    tasks: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.attention not in CONTROLS:
            patterns.setdefault(row.pattern, {})[row.attention] = row.index.total
            for task, value in row.index.tasks.items():
                tasks.setdefault(task, {})[row.attention] = value
    lines = []
    for title, scores in (("patterns", patterns), ("tasks", tasks)):
        if len(scores) < 2:
            continue
        found = correlation.correlations(scores)
        lines += [f"### correlation of {title} (attentions that both have)", ""]
        lines += _head(("", *scores))
        for first in scores:
            cells = (f"{found[first, b][0]:.2f} ({found[first, b][1]})" for b in scores)
            lines.append("| " + " | ".join((first, *cells)) + " |")
        lines.append("")
    return lines


def _lengths(records):
    """Perplexity of language models at other lengths than that of training."""
    rows = []
    for record in records:
        metrics = record["metrics"]
        others = {n: metrics.get(f"length_{n}/perplexity") for n in LANGUAGE_LENGTHS}
        if record["task"] == "language" and all(others.values()):
            others[128] = metrics["test/perplexity"]
            rows.append((record["attention"], others, correlation.extrapolation(others, 128)))
    if not rows:
        return []
    lengths = sorted(rows[0][1])
    lines = ["### perplexity at other lengths than 128, that of training (and the quotient)", ""]
    lines += _head(("attention", *map(str, lengths)))
    for name, found, quotients in rows:
        cells = (f"{_show(found[n])} ({quotients[n]:.3f})" for n in lengths)
        lines.append("| " + " | ".join((name, *cells)) + " |")
    return [*lines, ""]


def _notes(records):
    """Say what did not end, and who adds more parameters than the benchmark allows."""
    lines = [f"- {r['name']}: {r['status']}" for r in records if r["status"] != OK]
    sizes = {r["name"]: r["parameters"] for r in records if r["parameters"]}
    for record in records:
        name = record["name"]
        softmax = sizes.get(f"{record['pattern']}/{record['task']}/{REFERENCE}")
        if name in sizes and softmax and sizes[name] > (1 + SHARE) * softmax:
            lines.append(
                f"- {name}: {sizes[name]:,} parameters, {sizes[name] / softmax:.2f} times those "
                f"with softmax; CAB allows {1 + SHARE:g}"
            )
    return lines


def _show(value):
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}"


def draw(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> bool:
    """Draw a heat map of index by attention and task, and a radar of patterns; or costs. PNG."""
    if records and "task" not in records[0]:
        return efficiency.draw(records, path)
    rows = standings(records)
    if not rows:
        return False
    from attnjax.train.figures import draw_board

    attentions = list(dict.fromkeys(row.attention for row in rows))
    tasks = list(dict.fromkeys((row.pattern, task) for row in rows for task in row.index.tasks))
    found = {(row.attention, row.pattern): row.index for row in rows}
    if not tasks:
        return False
    values = [
        [
            found[name, pattern].tasks.get(task, math.nan) if (name, pattern) in found else math.nan
            for pattern, task in tasks
        ]
        for name in attentions
    ]
    labels = ["".join(p[0] for p in pattern.split("_")).upper() for pattern, _ in tasks]
    columns = [f"{label} {task}" for label, (_, task) in zip(labels, tasks, strict=True)]
    draw_board(attentions, columns, values, path)
    return True
