# SPDX-License-Identifier: Apache-2.0
"""Circuits, theory and predictors of in-context linear regression against known values."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.analysis.icl_linear_regression import circuits, measures, predictors, risk, theory
from attnjax.data.regression import Law
from attnjax.errors import RecipeError
from attnjax.models.regression_attention import RegressionAttention

SETTING = theory.Setting()
TIGHT, LOOSE = 1e-6, 1e-5


def network(**fields):
    model = RegressionAttention(**{"prompts": 3, "length": 7, "replicas": 2, **fields})
    example = model.example(2)
    keys = jax.random.split(jax.random.key(1), len(example))
    inputs = {
        name: jax.random.normal(k, x.shape)
        for k, (name, x) in zip(keys, example.items(), strict=True)
    }
    inputs["query"] = inputs["query"].at[..., model.dim :].set(0)
    params = model.init(jax.random.key(0), **inputs)["params"]
    return model, params, inputs


@pytest.mark.parametrize(("heads", "outputs"), [(1, 1), (3, 2)])
def test_circuits_predict_what_the_network_does(heads, outputs):
    model, params, inputs = network(heads=heads, outputs=outputs)
    prediction = model.apply({"params": params}, **inputs).prediction
    found = circuits.of_params(params)
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in inputs.items()}
    for replica in range(2):
        one = jax.tree.map(lambda x: x[replica], found)
        ours = circuits.predict(one, **flat)
        np.testing.assert_allclose(
            ours.reshape(2, 3, outputs), prediction[:, :, replica], atol=LOOSE
        )


def test_heads_of_ideal_circuits_are_the_reduced_model():
    omega, mu = np.float32([0.3, -0.2, 0.1]), np.float32([1.0, -2.0, 0.5])
    prompts = Law(length=9).draw(np.random.default_rng(0), 6)
    found = circuits.ideal(omega, mu, 5)
    full = circuits.predict(found, prompts.examples, prompts.query)[:, 0]
    reduced = predictors.attention_heads(omega, mu)(prompts.x, prompts.y[..., 0], prompts.x_query)
    np.testing.assert_allclose(full, reduced, atol=LOOSE)
    scores = np.einsum("n,psd,pd->pns", omega, prompts.x, prompts.x_query)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    by_hand = np.einsum("n,pns,ps->p", mu, weights, prompts.y[..., 0])
    np.testing.assert_allclose(reduced, by_hand, atol=LOOSE)


def test_patterns_of_ideal_circuits_are_perfect():
    found = circuits.ideal(np.float32([0.2, -0.2, 1e-3]), np.float32([2.0, -2.0, 1e-3]), 5)
    pattern = circuits.measure(found)
    np.testing.assert_allclose(pattern.omega, [0.2, -0.2, 1e-3], rtol=TIGHT)
    np.testing.assert_allclose(pattern.mu, [2.0, -2.0, 1e-3], rtol=TIGHT)
    assert pattern.kind.tolist() == [circuits.POSITIVE, circuits.NEGATIVE, circuits.DUMMY]
    for name, value in (("diagonal_ratio", 1), ("answer_ratio", 1), ("diagonal_variance", 0)):
        np.testing.assert_allclose(getattr(pattern, name), value, atol=TIGHT)
    np.testing.assert_allclose(pattern.imbalance, 1e-3 / 4.001, rtol=1e-3)
    np.testing.assert_allclose(pattern.spread, 0, atol=TIGHT)
    noisy = circuits.Circuits(found.kq + 0.1, found.ov + 0.1)
    spoilt = circuits.measure(noisy)
    assert spoilt.diagonal_ratio < 0.9 and spoilt.answer_ratio < 0.9


def test_heads_of_two_tasks_are_allocated():
    law = Law(dim=6, supports=(4, 4))
    diagonals = np.zeros((2, 8, 8), np.float32)
    for head, coordinates in enumerate((range(4), range(2, 6))):
        diagonals[head, list(coordinates), list(coordinates)] = 0.3
    ov = np.zeros((2, 2, 8), np.float32)
    ov[0, 0, 6], ov[1, 1, 7] = 2.0, -2.0
    found = circuits.Circuits(jnp.asarray(diagonals), jnp.asarray(ov))
    share = circuits.allocation(found, law.masks())
    assert share["task"].tolist() == [0, 1]
    np.testing.assert_allclose(share["support_share"], [[1, 0.5], [0.5, 1]])
    np.testing.assert_allclose(circuits.measure(found).mu, [2, -2])


def test_gradients_are_those_of_the_loss():
    rng = np.random.default_rng(0)
    omega, mu = jnp.asarray(0.3 * rng.standard_normal((2, 4)), jnp.float32)
    ours = theory.gradients(omega, mu, SETTING)
    auto = jax.grad(theory.loss, argnums=(0, 1))(omega, mu, SETTING)
    for a, b in zip(ours, auto, strict=True):
        np.testing.assert_allclose(a, b, atol=TIGHT)
    wide = [np.asarray(x, np.float64) for x in (omega, mu)]
    for part in (0, 1):
        for head in range(4):
            moved = [[x.copy() for x in wide] for _ in range(2)]
            for sign, heads in zip((1, -1), moved, strict=True):
                heads[part][head] += sign * 1e-4
            up, down = (_float64_loss(*heads) for heads in moved)
            np.testing.assert_allclose(ours[part][head], (up - down) / 2e-4, atol=2e-6)
    best = theory.best_mu(omega, SETTING)
    np.testing.assert_allclose(theory.gradients(omega, best, SETTING)[1], 0, atol=1e-5)


def _float64_loss(omega, mu):
    products = np.outer(omega, omega)
    matrix = products + 1.1 / 40 * np.exp(5 * products)
    return 1.1 - 2 * mu @ omega + mu @ matrix @ mu


def test_flow_reaches_what_is_known_of_it():
    found = theory.flow(np.float32([0.01]), np.float32([0.01]), SETTING, steps=20_000, every=1_000)
    omega, mu = theory.one_head(SETTING)
    np.testing.assert_allclose(found["omega"][-1], omega, atol=1e-3)
    np.testing.assert_allclose(found["mu"][-1], mu, atol=1e-3)
    np.testing.assert_allclose([omega, mu], [0.4472, 1.6277], atol=1e-4)
    np.testing.assert_allclose(found["loss"][-1], 0.37207, atol=1e-5)
    start = np.float32([0.01, -0.01])
    early = theory.flow(start, start, SETTING, steps=1_001, every=1_001)
    np.testing.assert_allclose(early["omega"][-1], [0.5005, -0.5005], atol=5e-5)
    np.testing.assert_allclose(early["mu"][-1], [0.8048, -0.8048], atol=5e-5)
    found = theory.flow(start, start, SETTING, steps=20_000, every=20_000)
    np.testing.assert_allclose(found["omega"][-1], [0.2725, -0.2725], atol=2e-4)
    np.testing.assert_allclose(found["mu"][-1], [1.5998, -1.5998], atol=1e-3)
    np.testing.assert_allclose(found["loss"][-1], 0.22336, atol=2e-5)
    uneven = theory.flow(
        np.float32([0.02, -0.01]), np.float32([0.02, -0.01]), SETTING, steps=20_000, every=20_000
    )
    np.testing.assert_allclose(uneven["omega"][-1].sum(), 0, atol=1e-3)
    np.testing.assert_allclose(uneven["mu"][-1].sum(), 0, atol=1e-3)


@pytest.mark.slow
def test_flow_of_many_steps_and_heads():
    start = np.float32([0.01, -0.01])
    found = theory.flow(start, start, SETTING, steps=400_000, every=400_000)
    np.testing.assert_allclose(found["omega"][-1], [0.1626, -0.1626], atol=5e-4)
    np.testing.assert_allclose(found["mu"][-1], [2.7001, -2.7001], atol=5e-3)
    product = found["omega"][-1] @ found["mu"][-1]
    np.testing.assert_allclose(product, 0.8782, atol=1e-3)
    np.testing.assert_allclose(theory.best_step(SETTING), 0.879, atol=1e-3)
    np.testing.assert_allclose(theory.opposite_heads_loss(SETTING), 0.221, atol=1e-3)
    rng = np.random.default_rng(3)
    omega, mu = (0.1 * rng.standard_normal(4).astype(np.float32) for _ in range(2))
    found = theory.flow(omega, mu, SETTING, steps=1_000_000, every=1_000_000)
    size = np.abs(found["omega"][-1])
    assert size.max() / size.min() < 1.01
    np.testing.assert_allclose(found["mu"][-1].sum(), 0, atol=1e-3)


def test_ridge_and_preconditioner_against_numpy():
    prompts = Law(dim=3, length=8, correlation=0.5).draw(np.random.default_rng(0), 5)
    x, y, query = prompts.x, prompts.y[..., 0], prompts.x_query
    ours = predictors.ridge(0.1)(x, y, query)
    for i in range(5):
        beta = np.linalg.solve(x[i].T @ x[i] + 0.3 * np.eye(3), x[i].T @ y[i])
        np.testing.assert_allclose(ours[i], beta @ query[i], rtol=1e-4, atol=1e-5)
    step = predictors.gradient_descent(0.7)(x, y, query)
    same = predictors.preconditioned(0.7 * np.eye(3))(x, y, query)
    np.testing.assert_allclose(step, same, atol=LOOSE)
    by_hand = 0.7 / 8 * np.einsum("ps,psd,pd->p", y, x - x.mean(axis=1, keepdims=True), query)
    ours = predictors.debiased_gradient_descent(0.7)(x, y, query)
    np.testing.assert_allclose(ours, by_hand, atol=LOOSE)


def test_the_best_preconditioner_of_independent_coordinates_is_the_best_step():
    drawn = list(risk.draw(Law(), 20_000, 0))
    stack = lambda name: np.concatenate([getattr(part, name) for part in drawn])
    best = predictors.fit_preconditioner(
        stack("x"), stack("y")[..., 0], stack("x_query"), stack("target")[:, 0]
    )
    np.testing.assert_allclose(best, theory.best_step(SETTING) * np.eye(5), atol=0.05)
    assert predictors.alignment(best, np.eye(5)) > 0.99


# Mean squared errors at 10, 40 and 100 examples, from 20,000 to 50,000 prompts. Those of a step at
# 10 are exact, with n = L - 1, s = 0.1 and the best step eta of 40 examples:
#   plain      1 + s - 2 eta + eta^2 (1 + (d + 1 + s d) / L)
#   debiased   1 + s - 2 eta n / L + eta^2 n (n + d + 1 + s d) / L^2
RISKS = {
    "two_heads": (0.6039, 0.2430, 0.1638),
    "one_head": (0.8754, 0.4048, 0.2844),
    "gradient_descent": (0.6169, 0.2407, 0.1622),
    "debiased": (0.5957, 0.2431, 0.1635),
    "ridge": (0.1938, 0.1146, 0.1041),
}


@pytest.mark.slow
def test_risks_are_those_of_the_formulas():
    report = measures.risk_report(lengths=(10, 40, 100), count=50_000)
    for name, expected in RISKS.items():
        np.testing.assert_allclose(report.tables["risk"][name], expected, rtol=0.03, err_msg=name)
    wide = theory.Setting(20, 100, 3.0)
    compared = {
        "gradient": predictors.gradient_descent(theory.best_step(wide)),
        "ridge": predictors.ridge(3.0),
    }
    found = risk.risks(compared, Law(dim=20, noise=3.0), [100], count=20_000)
    np.testing.assert_allclose(found["gradient"][100][0], 3.442, rtol=0.03)
    np.testing.assert_allclose(found["ridge"][100][0], 3.404, rtol=0.03)
    np.testing.assert_allclose(theory.ridge_risk(wide), 3.404, rtol=1e-3)


def test_reports_are_written_and_repeat(tmp_path):
    first = measures.risk_report(lengths=(4, 8), count=200)
    again = measures.risk_report(lengths=(4, 8), count=200)
    assert first.to_json() == again.to_json()
    files = {path.name for path in first.write(tmp_path, "risk")}
    assert files == {"risk.json", "risk.md", "risk-risk.csv", "risk-risk.png"}
    stored = json.loads((tmp_path / "risk.json").read_text())
    assert stored["tables"]["risk"]["length"] == [4, 8]
    with (tmp_path / "risk-risk.csv").open() as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["4", "8"]
    _, params, _ = network(heads=2)
    shown = measures.circuits_report(params, {"length": 7})
    names = {path.name for path in shown.write(tmp_path, "circuits")}
    assert {"circuits.npz", "circuits-kq.png", "circuits-heads.csv"} <= names
    assert len(shown.tables["heads"]["kind"]) == 4
    flow = measures.theory_report(steps=100, heads=3)
    assert flow.arrays["omega"].shape == (101, 3)
    curve = measures.lengths_report(params, {"length": 7}, lengths=(3, 5), count=100)
    assert set(curve.numbers) == {"network", "debiased", "ridge"}
    matrix = measures.preconditioner_report(params, {"length": 7}, count=500)
    assert -1 <= matrix.numbers["alignment"].value <= 1


def test_wrong_arguments_are_refused():
    _, params, _ = network(heads=2)
    for call, error, message in (
        (lambda: theory.Setting(dim=0), ValueError, "dim >= 1"),
        (lambda: theory.flow(np.ones(2), np.ones(3), SETTING, steps=1), ValueError, r"\[n\]"),
        (lambda: theory.flow(np.ones(2), np.ones(2), SETTING, steps=3, every=2), ValueError,
         "multiple"),
        (lambda: circuits.of_params({"query_kernel": 0}), ValueError, "no key_kernel"),
        (lambda: circuits.extract(np.ones((3, 2, 3)), np.ones((3, 2, 4)), np.ones((3, 2, 3)),
                                  np.ones((2, 3, 1))), ValueError, "do not fit"),
        (lambda: measures.risk_report(noise=-1.0), RecipeError, "noise >= 0"),
        (lambda: measures.risk_report(lengths=(), count=10), RecipeError, "1 example"),
        (lambda: measures.theory_report(heads=0), RecipeError, "heads=0"),
        (lambda: measures.circuits_report(params, {"dim": 4}), RecipeError, "dim=5"),
        (lambda: measures.lengths_report(params, {}, replica=2), RecipeError, "replica=2"),
        (lambda: measures.lengths_report(params, {"dim": 6, "supports": (4, 4)}), RecipeError,
         "two tasks"),
        (lambda: risk.risks({}, Law(supports=(2, 2)), [3]), ValueError, "one task"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
