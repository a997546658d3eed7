# SPDX-License-Identifier: Apache-2.0
"""A paper's claim as a value: what to compare, conditions to meet, and the arithmetic.

`configs/<slug>/claim.py` defines `get_claim() -> Claim`. Nothing here trains anything or imports
JAX; `attnjax.train.claim` runs the arms.
"""

import dataclasses
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnjax import recipe as recipe_lib
from attnjax import registry
from attnjax.errors import RecipeError

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison: a recipe, what it changes, and the number that counts.

    Attributes:
      config: a recipe such as "configs/crossvit/digits.py:cross".
      metric: a final metric of the run, such as "test/accuracy".
      overrides: recipe fields by dotted path, such as `{"optim.lr": 1e-3}`.
    """

    config: str
    metric: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def recipe(self, seed: int) -> recipe_lib.Recipe:
        """Return the validated recipe of this arm for one seed.

        Raises:
          RecipeError: config or overrides are wrong.
        """
        recipe = recipe_lib.load(self.config)
        for path, value in {**self.overrides, "seed": seed}.items():
            override(recipe, path, value)
        return recipe.validate()


@dataclasses.dataclass(frozen=True)
class Measurement:
    """An arm that trains nothing: a registered measurement.

    Attributes:
      metric: a name in the registry's table of measurements, such as "placement_balance".
      options: arguments of its constructor; the made object turns a seed into a number.
    """

    metric: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def make(self) -> Callable[[int], float]:
        """Return the function of a seed.

        Raises:
          RecipeError: the name or an option is wrong.
        """
        target = registry.resolve("measurement", self.metric)
        recipe_lib.check_arguments(target, self.options, f"measurement {self.metric}")
        try:
            return target(**self.options)
        except ValueError as error:
            raise RecipeError(f"measurement {self.metric}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Condition:
    """A bound that must hold for every seed.

    Attributes:
      arm: an arm, or a difference of two such as "cross - none" (taken seed by seed).
      op: `>=`, `<=`, `>` or `<`.
      threshold: the bound.
    """

    arm: str
    op: str
    threshold: float


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says its idea is worth, in a form that can be measured here.

    Attributes:
      statement: the claim in one sentence.
      baseline: what it is compared with, in one sentence.
      arms: what is compared, by name.
      conditions: all of them must hold for every seed.
      effect: the headline number: an arm, or a difference such as "cross - none".
      seeds: number of seeds (0, 1, ...) by default.
    """

    statement: str
    baseline: str
    arms: Mapping[str, Arm | Measurement]
    conditions: Sequence[Condition]
    effect: str
    seeds: int = 3

    def validate(self) -> "Claim":
        """Check names, operators and recipes of all arms; return the claim itself.

        Raises:
          RecipeError: says what is wrong.
        """
        if not self.conditions:
            raise RecipeError("a claim needs at least one condition")
        for text in (self.effect, *(condition.arm for condition in self.conditions)):
            for name in _terms(text):
                if name not in self.arms:
                    raise RecipeError(
                        f"claim: unknown arm {name!r}: {registry.nearest(name, self.arms)}"
                    )
        for condition in self.conditions:
            if condition.op not in _OPERATORS:
                raise RecipeError(
                    f"claim: operator {condition.op!r} is none of {', '.join(_OPERATORS)}"
                )
        for name, arm in self.arms.items():
            try:
                recipe = arm.make() if isinstance(arm, Measurement) else arm.recipe(seed=0)
            except RecipeError as error:
                raise RecipeError(f"claim, arm {name!r}: {error}") from error
            if isinstance(arm, Measurement):
                continue
            if arm.metric.partition("/")[0] not in recipe.evals:
                raise RecipeError(
                    f"claim, arm {name!r}: metric {arm.metric!r} belongs to no evaluation: "
                    f"{registry.nearest(arm.metric.partition('/')[0], recipe.evals)}"
                )
        return self


def load(slug: str) -> Claim:
    """Return the claim of a system, not validated yet.

    Raises:
      RecipeError: no such system, or it states no claim.
    """
    registry.system(slug)
    path = f"configs/{slug}/claim.py"
    if not exists(slug):
        raise RecipeError(f"{slug} states no claim: there is no {path}")
    return recipe_lib.execute(path).get_claim()


def exists(slug: str) -> bool:
    """Say whether a system states a claim."""
    return (recipe_lib.folder() / slug / "claim.py").is_file()


def judge(claim: Claim, per_seed: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Turn measurements into the numbers of a claim's record.

    effect = mean over seeds of the paired difference, spread = its sample standard deviation

    Args:
      claim: what was measured.
      per_seed: arm name -> one measurement per seed, in the same order of seeds for all arms.

    Returns:
      `effect`, `spread`, `mean` per arm, `conditions` with the measured values, and `holds`.
    """
    values = _evaluate(claim.effect, per_seed)
    conditions = []
    for condition in claim.conditions:
        measured = _evaluate(condition.arm, per_seed)
        compare = _OPERATORS[condition.op]
        # A diverged run measures NaN, which meets no condition.
        holds = all(compare(value, condition.threshold) for value in measured)
        conditions.append({**dataclasses.asdict(condition), "measured": measured, "holds": holds})
    return {
        "effect": round(statistics.fmean(values), 6),
        "spread": round(statistics.stdev(values), 6) if len(values) > 1 else 0.0,
        "mean": {arm: round(statistics.fmean(v), 6) for arm, v in per_seed.items()},
        "conditions": conditions,
        "holds": all(condition["holds"] for condition in conditions),
    }


def _terms(text: str) -> list[str]:
    terms = [term.strip() for term in text.split(" - ")]
    if len(terms) > 2:
        raise RecipeError(f"claim: {text!r} must be an arm or a difference of two arms")
    return terms


def _evaluate(text, per_seed) -> list[float]:
    first, *rest = (per_seed[name] for name in _terms(text))
    if not rest:
        return list(first)
    return [round(a - b, 6) for a, b in zip(first, rest[0], strict=True)]


def override(recipe: recipe_lib.Recipe, path: str, value: Any) -> None:
    """Set a field of a recipe.

    Args:
      recipe: is changed.
      path: dotted, such as "optim.lr".
      value: the new value.

    Raises:
      RecipeError: there is no such field.
    """
    *parents, last = path.split(".")
    node = recipe
    for key in (*parents, last):
        if isinstance(node, dict) and key is last:
            break  # an unknown constructor argument is found by Recipe.validate
        known = node if isinstance(node, dict) else vars(node)
        if key not in known:
            raise RecipeError(f"override {path}: unknown; {registry.nearest(key, known)}")
        if key is not last:
            node = known[key]
    if isinstance(node, dict):
        node[last] = value
    else:
        setattr(node, last, value)
