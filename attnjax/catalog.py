# SPDX-License-Identifier: Apache-2.0
"""What this project offers: every registered system with its presets, recipes, claim and status.

Model files are read, not imported: listing thirty systems must not cost thirty imports.
"""

import ast
import dataclasses
import functools
import json
import pathlib
from typing import Any

from attnjax import claim as claim_lib
from attnjax import recipe as recipe_lib
from attnjax import registry
from attnjax.errors import RecipeError

README_START = "<!-- systems: written by `python -m launch.systems --readme` -->"
README_END = "<!-- end of systems -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """One system as users see it.

    Attributes:
      slug, kind, title: as registered.
      paper: identifier and year, such as "arXiv:2103.14899 (2021)".
      presets: named configurations of the model.
      recipes: config files, such as "configs/crossvit/digits.py".
      claim: the claim as it is measured here; empty when none is stated.
      status: what has been shown: "weight map", "smoke recipe", "claim reproduced", ...
      result: the newest measurement in words; empty when there is none.
    """

    slug: str
    kind: str
    title: str
    paper: str
    presets: tuple[str, ...]
    recipes: tuple[str, ...]
    claim: str
    status: tuple[str, ...]
    result: str


def rows() -> list[Row]:
    """Return one row per registered system, in the order of the registry."""
    records = newest_records()
    return [_row(system, records.get(system.slug)) for system in registry.SYSTEMS.values()]


def with_claims() -> list[str]:
    """List the slugs of systems that state a claim."""
    return [slug for slug in registry.SYSTEMS if claim_lib.exists(slug)]


def installed() -> bool:
    """Say whether the package runs from an installation instead of a clone."""
    return recipe_lib.folder().parent == pathlib.Path(__file__).resolve().parent


def results_file() -> pathlib.Path:
    """Return the JSON-lines file that collects measured claims."""
    return recipe_lib.folder() / "results.jsonl"


def newest_records() -> dict[str, dict[str, Any]]:
    """Return the last record of every system in the results file.

    Raises:
      RecipeError: a line is no JSON object of a registered system (file and line are named).
    """
    path, newest = results_file(), {}
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            newest[registry.system(record["system"]).slug] = record
        except (json.JSONDecodeError, TypeError, KeyError, RecipeError) as error:
            raise RecipeError(f"{path}:{number}: no record of a claim: {error}") from error
    return newest


def table() -> str:
    """Return the systems as a Markdown table, as it stands in the README."""
    lines = [
        "| system | kind | paper | presets | recipes | status | measured here |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        recipes = ", ".join(f"[{pathlib.PurePath(r).stem}]({r})" for r in row.recipes)
        presets = ", ".join(row.presets)
        cells = (f"`{row.slug}`<br>{row.title}", row.kind, row.paper, presets, recipes,
                 ", ".join(row.status), row.result or "-")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill_readme(text: str) -> str:
    """Return the README with its table of systems replaced by the current one.

    Raises:
      RecipeError: the markers around the table are missing.
    """
    before, start, rest = text.partition(README_START)
    _, end, after = rest.partition(README_END)
    if not start or not end:
        raise RecipeError(f"README.md lacks the markers {README_START} and {README_END}")
    return f"{before}{start}\n{table()}\n{end}{after}"


def _row(system, record):
    constants = _constants(system.module)
    paper = constants.get("PAPER") or {}
    names = sorted(path for path in recipe_lib.available() if f"/{system.slug}/" in path)
    stated = claim_lib.exists(system.slug)
    status = []
    if constants.get("TORCH_NAMES"):
        status.append("weight map")
    if any(name.endswith("/smoke.py") for name in names):
        status.append("smoke recipe")
    if record:
        status.append("claim reproduced" if record["holds"] else "claim not reproduced")
    elif stated:
        status.append("claim not measured yet")
    return Row(
        slug=system.slug,
        kind=system.kind,
        title=system.title,
        paper=f"{paper.get('id', '?')} ({paper.get('year', '?')})",
        presets=tuple(constants.get("PRESETS") or ()),
        recipes=tuple(names),
        claim=claim_lib.load(system.slug).statement if stated else "",
        status=tuple(status),
        result=_describe(record) if record else "",
    )


def _describe(record):
    means = record["mean"].items()
    arms = ", ".join(f"{arm} {mean:.3f}" for arm, mean in means if mean is not None)
    return f"{arms} (mean of {len(record['seeds'])} seeds)"


@functools.cache
def _constants(module: str) -> dict[str, Any]:
    """Read PAPER, the names of PRESETS and whether TORCH_NAMES is set from a module's source."""
    source = pathlib.Path(__file__).resolve().parent.parent.joinpath(*module.split("."))
    source = source.with_suffix(".py")
    if not source.is_file():
        source = source.with_suffix("") / "__init__.py"
    found: dict[str, Any] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        for target in targets:
            name = target.id if isinstance(target, ast.Name) else ""
            if name == "PAPER":
                found[name] = ast.literal_eval(node.value)
            elif name == "PRESETS" and isinstance(node.value, ast.Dict):
                found[name] = [ast.literal_eval(key) for key in node.value.keys if key]
            elif name == "TORCH_NAMES":
                found[name] = not (
                    isinstance(node.value, ast.Constant) and node.value.value is None
                )
    return found
