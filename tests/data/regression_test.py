# SPDX-License-Identifier: Apache-2.0
"""Laws of regression prompts: moments, supports, files."""

import numpy as np
import pytest

from attnjax.data.regression import Law, RegressionPrompts, load_prompts, save_prompts
from attnjax.errors import RecipeError


def draw(count=4_000, **fields):
    return Law(**fields).draw(np.random.default_rng(0), count)


def test_moments_of_one_task():
    prompts = draw(length=10)
    assert prompts.examples.shape == (4_000, 10, 6) and prompts.examples.dtype == np.float32
    np.testing.assert_array_equal(prompts.query[:, 5], 0)
    covariance = np.cov(prompts.x.reshape(-1, 5).T)
    np.testing.assert_allclose(covariance, np.eye(5), atol=0.03)
    np.testing.assert_allclose(prompts.y.var(), 1.1, rtol=0.05)
    rest = prompts.y[..., 0] - np.einsum("psd,pd->ps", prompts.x, prompts.beta[..., 0])
    np.testing.assert_allclose(rest.var(), 0.1, rtol=0.03)
    rest = prompts.target[:, 0] - np.einsum("pd,pd->p", prompts.x_query, prompts.beta[..., 0])
    np.testing.assert_allclose(rest.var(), 0.1, rtol=0.1)


def test_correlated_coordinates_have_their_covariance():
    prompts = draw(length=10, correlation=0.5)
    expected = 0.5 ** np.abs(np.arange(5)[:, None] - np.arange(5))
    np.testing.assert_allclose(Law(correlation=0.5).covariance(), expected)
    np.testing.assert_allclose(np.cov(prompts.x.reshape(-1, 5).T), expected, atol=0.03)


def test_two_tasks_read_their_own_coordinates_and_tell_the_query_without_noise():
    prompts = draw(dim=6, supports=(4, 4), length=10)
    assert prompts.examples.shape[-1] == 8 and prompts.target.shape == (4_000, 2)
    np.testing.assert_array_equal(prompts.beta[:, 4:, 0], 0)
    np.testing.assert_array_equal(prompts.beta[:, :2, 1], 0)
    told = np.einsum("pd,pdo->po", prompts.x_query, prompts.beta)
    np.testing.assert_allclose(prompts.target, told, atol=1e-5)
    rest = prompts.y - np.einsum("psd,pdo->pso", prompts.x, prompts.beta)
    np.testing.assert_allclose(rest.var(axis=(0, 1)), [0.4, 0.4], rtol=0.03)
    np.testing.assert_allclose(np.square(prompts.target).mean(), 4, rtol=0.1)


def test_diabetes_inputs_are_its_standardised_columns():
    prompts = draw(50, inputs="diabetes", dim=10, length=100)
    rows = prompts.x.reshape(-1, 10)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(rows.std(axis=0), 1, atol=0.1)
    assert len(np.unique(rows, axis=0)) <= 442
    with pytest.raises(RecipeError, match=r"source\.dim=11: the diabetes set has 10"):
        draw(1, inputs="diabetes", dim=11)


def test_groups_depend_on_seed_split_and_index_alone():
    source = RegressionPrompts(prompts=3, length=4)
    np.testing.assert_array_equal(source[5]["examples"], source[5]["examples"])
    for other in (RegressionPrompts("test", prompts=3, length=4),
                  RegressionPrompts(seed=1, prompts=3, length=4)):  # fmt: skip
        assert np.abs(other[5]["examples"] - source[5]["examples"]).max() > 0.1
    assert {k: v.shape for k, v in source[0].items()} == {
        "examples": (3, 4, 6), "query": (3, 6), "target": (3, 1)
    }  # fmt: skip
    assert len(RegressionPrompts(size=7)) == 7


def test_prompts_survive_a_file(tmp_path):
    prompts = draw(4, length=3)
    save_prompts(tmp_path / "prompts.npz", prompts)
    found = load_prompts(tmp_path / "prompts.npz")
    for name in ("examples", "query", "target", "beta"):
        np.testing.assert_array_equal(getattr(found, name), getattr(prompts, name))
    np.savez(tmp_path / "short.npz", z=prompts.examples)
    np.savez(
        tmp_path / "wrong.npz", z=prompts.examples, z_q=prompts.query[:, :5],
        y_q=prompts.target, beta=prompts.beta,
    )  # fmt: skip
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    for name, message in (
        ("absent.npz", "no file"),
        ("short.npz", "no array beta, y_q, z_q"),
        ("wrong.npz", r"z_q has shape \(4, 5\)"),
        ("broken.npz", "cannot be read"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(dim=0), "source.dim=0"),
        (dict(length=0), "source.length=0"),
        (dict(noise=-0.1), "source.noise=-0.1"),
        (dict(correlation=1.0), "source.correlation=1.0"),
        (dict(supports=(6, 4)), r"source.supports=\(6, 4\)"),
        (dict(supports=(4,)), r"source.supports=\(4,\)"),
        (dict(inputs="uniform"), "source.inputs='uniform'"),
        (dict(prompts=0), "source.prompts=0"),
    ],
)
def test_wrong_arguments_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        RegressionPrompts(**fields)
