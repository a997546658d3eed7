# SPDX-License-Identifier: Apache-2.0
"""What `launch.analyze` measures of in-context linear regression, one function per report.

He, Pan, Chen and Yang, "In-Context Linear Regression Demystified", arXiv 2503.12734.

Functions that read a trained network take its `params` and the `source` of its recipe first; the
others need nothing. All options are numbers or lists of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.analysis.icl_linear_regression import circuits, predictors, theory
from attnjax.analysis.icl_linear_regression.risk import draw, risks
from attnjax.analysis.report import HeatMaps, Lines, Number, Report, Scatter
from attnjax.data.regression import Law, load_prompts
from attnjax.errors import RecipeError
from attnjax.typing import Params

PAPER = {
    "title": "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic "
    "Interpretability of Multi-Head Softmax Attention",
    "id": "arXiv:2503.12734",
    "year": 2025,
    "code": "XintianPan/ICL_linear",
    "licence": "none stated",
    "claim": "Pairs of opposite heads learn one debiased step of gradient descent.",
}

LENGTHS = tuple(range(10, 101, 5))
"""Examples of a prompt at which length generalisation is measured."""

KINDS = {circuits.POSITIVE: "positive", circuits.NEGATIVE: "negative", circuits.DUMMY: "dummy"}


def theory_report(
    *, dim: int = 5, length: int = 40, noise: float = 0.1, heads: int = 2, start: float = 0.01,
    steps: int = 20_000, rate: float = 0.01, seed: int = 0,
) -> Report:  # fmt: skip
    """Follow the flow of the approximate loss from a small start, and give its optima.

    Args:
      dim, length, noise: of the regression.
      heads: 1 starts at omega = mu = start, 2 at +-start; more at normal numbers times start.
      start: size of the first omega and mu.
      steps, rate: of the flow.
      seed: of the normal numbers.
    """
    if heads < 1 or steps < 1:
        raise RecipeError(f"heads={heads}, steps={steps}: must be at least 1")
    setting = _setting(dim, length, noise)
    if heads <= 2:
        first = start * np.array([1.0, -1.0][:heads], np.float32)
        omega, mu = first, first
    else:
        rng = np.random.default_rng(seed)
        omega, mu = (start * rng.standard_normal(heads).astype(np.float32) for _ in range(2))
    every = max(steps // 400, 1)
    found = theory.flow(omega, mu, setting, steps=steps // every * every, rate=rate, every=every)
    found = {name: np.asarray(value) for name, value in found.items()}
    one_omega, one_mu = theory.one_head(setting)
    numbers = {
        "final_loss": Number(found["loss"][-1], "approximate loss where the flow ended"),
        "product": Number(
            found["omega"][-1] @ found["mu"][-1], "sum of omega_h mu_h, the effective step"
        ),
        "mu_sum": Number(found["mu"][-1].sum(), "sum of mu_h"),
        "best_step": Number(theory.best_step(setting), "best step of gradient descent"),
        "opposite_heads_loss": Number(
            theory.opposite_heads_loss(setting), "limit of the loss of opposite heads"
        ),
        "one_head_omega": Number(one_omega, "best omega of one head"),
        "one_head_mu": Number(one_mu, "best mu of one head"),
        "ridge_risk": Number(theory.ridge_risk(setting), "asymptotic risk of Bayes' estimate"),
    }
    step = np.maximum(found["step"], 1)
    table = {"step": found["step"], "loss": found["loss"]}
    for name in ("omega", "mu"):
        table |= {f"{name}_{h}": found[name][:, h] for h in range(heads)}
    return Report(
        "Flow of the approximate loss",
        numbers,
        {"flow": table},
        found,
        {
            name: Lines(
                step, {f"{name}_{h}": found[name][:, h] for h in range(heads)}, ("step", name), True
            )
            for name in ("omega", "mu")
        },
    )


def risk_report(
    *, dim: int = 5, noise: float = 0.1, trained_length: int = 40, lengths: Sequence[int] = LENGTHS,
    count: int = 20_000, seed: int = 0, prompts: str = "",
) -> Report:  # fmt: skip
    """Estimate the errors of all predictors over the number of examples.

    Args:
      dim, noise: of the regression.
      trained_length: examples for which heads and steps are the best.
      lengths: examples of the prompts.
      count: prompts per length.
      seed: of the prompts.
      prompts: an .npz file of prompts to use instead, of one length.
    """
    setting = _setting(dim, trained_length, noise)
    one_omega, one_mu = theory.one_head(setting)
    eta = theory.best_step(setting)
    omega = np.array([0.1, -0.1], np.float32)
    compared = {
        "one_head": predictors.attention_heads(np.float32(one_omega), np.float32(one_mu)),
        "two_heads": predictors.attention_heads(omega, theory.best_mu(omega, setting)),
        "gradient_descent": predictors.gradient_descent(eta),
        "debiased": predictors.debiased_gradient_descent(eta),
        "ridge": predictors.ridge(noise),
    }
    if prompts:
        return _stored_risk(compared, prompts)
    law = Law(dim=dim, noise=noise)
    return _risk_over_lengths("Errors of predictors", compared, law, lengths, count, seed)


def circuits_report(params: Params, source: Mapping[str, Any]) -> Report:
    """Say what the heads of a trained network are, replica by replica."""
    law = _law(source)
    found = circuits.of_params(jax.device_get(params))
    if found.outputs != law.outputs or found.dim != law.dim:
        raise RecipeError(
            f"parameters of dim={found.dim} and {found.outputs} answers, prompts of {law}"
        )
    pattern = jax.device_get(circuits.measure(found))
    r, n = pattern.omega.shape
    table: dict[str, list] = {
        "replica": np.repeat(np.arange(r), n).tolist(),
        "head": np.tile(np.arange(n), r).tolist(),
        "kind": [KINDS[int(kind)] for kind in pattern.kind.ravel()],
        "omega": pattern.omega.ravel().tolist(),
        "mu": pattern.mu.ravel().tolist(),
    }
    tables: dict[str, Mapping[str, Sequence]] = {"heads": table}
    if law.outputs > 1:
        shares = [circuits.allocation(_replica(found, i), law.masks()) for i in range(r)]
        table["task"] = np.concatenate([share["task"] for share in shares]).tolist()
        for name in ("answer_share", "support_share"):
            for task in range(law.outputs):
                values = np.concatenate([share[name][:, task] for share in shares])
                table[f"{name}_{task}"] = values.tolist()
    names = ("diagonal_ratio", "diagonal_variance", "answer_ratio", "imbalance", "spread")
    tables["replicas"] = {
        "replica": list(range(r)), **{name: getattr(pattern, name).tolist() for name in names}
    }  # fmt: skip
    meanings = (
        "squares of KQ's diagonal over its d x d block",
        "variance of KQ's diagonal",
        "squares of OV on the answers over all",
        "|sum mu| / sum |mu|",
        "largest over smallest |omega| minus 1, without dummies",
    )
    numbers = {
        name: Number(float(np.median(getattr(pattern, name))), f"{meaning}, median of replicas")
        for name, meaning in zip(names, meanings, strict=True)
    }
    return Report(
        "Circuits",
        numbers,
        tables,
        {"kq": found.kq, "ov": found.ov, "omega": pattern.omega, "mu": pattern.mu},
        {
            "kq": HeatMaps({f"head {h}": np.asarray(found.kq)[0, h] for h in range(n)}),
            "ov": HeatMaps({f"head {h}": np.asarray(found.ov)[0, h] for h in range(n)}),
            "heads": Scatter(
                {f"replica {i}": np.stack([pattern.omega[i], pattern.mu[i]], 1) for i in range(r)},
                ("omega", "mu"),
            ),
        },
    )


def lengths_report(
    params: Params, source: Mapping[str, Any], *, replica: int = 0,
    lengths: Sequence[int] = LENGTHS, count: int = 20_000, seed: int = 0,
) -> Report:  # fmt: skip
    """Estimate the errors of a trained network, computed from its circuits, over lengths.

    Args:
      params, source: of the run.
      replica: which of its networks.
      lengths: examples of the prompts.
      count: prompts per length.
      seed: of the prompts.
    """
    law = _law(source)
    if law.outputs != 1:
        raise RecipeError("lengths: the networks of two tasks answer more than one question")
    chosen = _chosen(params, replica)

    def network(x, y, query):
        tokens = jnp.concatenate([x, y[..., None]], axis=-1)
        return circuits.predict(chosen, tokens, jnp.pad(query, ((0, 0), (0, 1))))[:, 0]

    compared = {
        "network": network,
        "debiased": predictors.debiased_gradient_descent(
            theory.best_step(_setting(law.dim, law.length, law.noise))
        ),
        "ridge": predictors.ridge(law.noise),
    }
    return _risk_over_lengths("Errors over lengths", compared, law, lengths, count, seed)


def preconditioner_report(
    params: Params, source: Mapping[str, Any], *, replica: int = 0, count: int = 50_000,
    seed: int = 0,
) -> Report:  # fmt: skip
    """Compare sum_h mu_h KQ^h with the preconditioner of the best single gradient step.

    Args:
      params, source: of the run.
      replica: which of its networks.
      count: prompts for the least squares.
      seed: of the prompts.
    """
    law = _law(source)
    if law.outputs != 1:
        raise RecipeError("preconditioner: networks of two tasks have one for each")
    chosen = _chosen(params, replica)
    parts = list(draw(law, count, seed))
    stack = lambda name: np.concatenate([getattr(part, name) for part in parts])
    best = predictors.fit_preconditioner(
        stack("x"), stack("y")[..., 0], stack("x_query"), stack("target")[:, 0]
    )
    d = law.dim
    mu = np.asarray(chosen.ov)[:, 0, d]
    ours = np.einsum("n,nij->ij", mu, np.asarray(chosen.kq)[:, :d, :d])
    inverse = np.linalg.inv(law.covariance())
    numbers = {
        "alignment": Number(
            predictors.alignment(ours, best), "cosine of sum mu KQ with the best preconditioner"
        ),
        "alignment_inverse": Number(
            predictors.alignment(ours, inverse), "cosine of sum mu KQ with the inverse covariance"
        ),
        "best_alignment_inverse": Number(
            predictors.alignment(best, inverse),
            "cosine of the best preconditioner with the inverse covariance",
        ),
    }
    return Report(
        "Preconditioner",
        numbers,
        arrays={"network": ours, "best": best, "inverse_covariance": inverse},
        pictures={"matrices": HeatMaps({"sum mu KQ": ours, "best": best})},
    )


MEASURES = {
    "circuits": circuits_report,
    "lengths": lengths_report,
    "preconditioner": preconditioner_report,
    "risk": risk_report,
    "theory": theory_report,
}
"""Name -> function; those with `params` need a run."""


def _risk_over_lengths(title, compared, law, lengths, count, seed):
    try:
        found = risks(compared, law, lengths, count=count, seed=seed)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    table: dict[str, list] = {"length": list(lengths)}
    for name, by_length in found.items():
        table[name] = [by_length[length][0] for length in lengths]
        table[f"{name}_error"] = [by_length[length][1] for length in lengths]
    last = lengths[-1]
    numbers = {
        name: Number(*(by_length[last][0], f"mean squared error at {last} examples"),
                     error=by_length[last][1])
        for name, by_length in found.items()
    }  # fmt: skip
    lines = Lines(
        np.array(lengths), {name: table[name] for name in found}, ("examples", "squared error")
    )
    return Report(title, numbers, {"risk": table}, {}, {"risk": lines})


def _stored_risk(compared, path):
    prompts = load_prompts(path)
    if prompts.y.shape[-1] != 1:
        raise RecipeError(f"{path}: predictors answer one task, the prompts have two")
    numbers = {}
    for name, predictor in compared.items():
        guess = jax.jit(predictor)(prompts.x, prompts.y[..., 0], prompts.x_query)
        squares = np.square(np.asarray(guess, np.float64) - prompts.target[:, 0])
        numbers[name] = Number(
            squares.mean(), f"mean squared error on {len(squares)} stored prompts",
            squares.std() / np.sqrt(len(squares)),
        )  # fmt: skip
    return Report("Errors of predictors", numbers)


def _setting(dim, length, noise):
    try:
        return theory.Setting(dim, length, noise)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _law(source):
    names = {field.name for field in dataclasses.fields(Law)}
    given = {name: value for name, value in source.items() if name in names}
    return Law(**{**given, "supports": tuple(given.get("supports", ()))})


def _chosen(params, replica):
    found = circuits.of_params(jax.device_get(params))
    if not 0 <= replica < len(found.kq):
        raise RecipeError(f"replica={replica}: the run has {len(found.kq)}")
    return _replica(found, replica)


def _replica(found, index):
    return jax.tree.map(lambda x: x[index], found)
