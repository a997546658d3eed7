# SPDX-License-Identifier: Apache-2.0
"""Metric states against scikit-learn, and their algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnjax import metrics
from attnjax.metrics import Accuracy, ConfusionMatrix, Mean, TopK

CLASSES = 7
MEAN_ROUNDING = 1e-6
"""float32 sum of a few hundred values of order one."""


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(300, CLASSES)).astype(np.float32),
        rng.integers(0, CLASSES, 300).astype(np.int32),
        rng.random(300) < 0.8,
    )


def test_accuracy_equals_scikit_learn(data):
    logits, labels, valid = data
    mine = jax.jit(Accuracy.from_logits)(logits, labels, valid=valid).compute()
    assert mine == sklearn.metrics.accuracy_score(labels[valid], logits.argmax(-1)[valid])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_scikit_learn(data, k):
    logits, labels, valid = data
    mine = TopK.from_logits(logits, labels, k, valid=valid).compute()
    theirs = sklearn.metrics.top_k_accuracy_score(
        labels[valid], logits[valid], k=k, labels=range(CLASSES)
    )
    assert mine == theirs


def test_confusion_equals_scikit_learn(data):
    logits, labels, valid = data
    guesses = logits.argmax(-1)
    mine = ConfusionMatrix.of(labels, guesses, CLASSES, valid=valid).compute()
    theirs = sklearn.metrics.confusion_matrix(labels[valid], guesses[valid], labels=range(CLASSES))
    np.testing.assert_array_equal(mine, theirs)
    assert mine.sum() == valid.sum()


def test_weighted_mean_equals_numpy(data):
    logits, _, _ = data
    values, weights = logits[:, 0], np.abs(logits[:, 1])
    mine = Mean.of(values, valid=weights).compute()
    assert mine == pytest.approx(np.average(values, weights=weights), abs=MEAN_ROUNDING)


@jax.jit
def states(logits, labels, valid):
    return {
        "accuracy": Accuracy.from_logits(logits, labels, valid=valid),
        "top2": TopK.from_logits(logits, labels, 2, valid=valid),
        "confusion": ConfusionMatrix.of(labels, jnp.argmax(logits, -1), CLASSES, valid=valid),
    }


def test_merging_batches_is_exact(data):
    whole = metrics.compute(states(*data))
    parts = zip(*(np.split(array, 3) for array in data), strict=True)
    merged = functools.reduce(metrics.merge, (states(*part) for part in parts), None)
    for name, value in metrics.compute(merged).items():
        np.testing.assert_array_equal(value, whole[name])
    assert isinstance(merged["top2"], TopK) and merged["accuracy"].total.dtype == jnp.int32


def test_sharded_batch_gives_the_same_state(data):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))
    whole, split = metrics.compute(states(*data)), metrics.compute(states(*sharded))
    for name in whole:
        np.testing.assert_array_equal(split[name], whole[name])


def test_masked_values_do_not_matter_even_when_nan():
    mean = Mean.of(jnp.array([1.0, jnp.nan, 3.0]), valid=jnp.array([True, False, True]))
    assert mean.compute() == 2.0


def test_nothing_valid_is_nan_and_neutral_to_merge():
    empty = Mean.of(jnp.array([5.0]), valid=jnp.array([False]))
    assert np.isnan(empty.compute())
    assert empty.merge(Mean.of(jnp.array([2.0]))).compute() == 2.0


def test_counts_stay_exact_where_float32_stops_counting():
    big = Accuracy(total=jnp.int32(2**24), weight=jnp.int32(2**24 + 1))
    one = Accuracy.of(jnp.array([True]))
    assert int(big.merge(one).total) == 2**24 + 1


def test_ties_follow_argmax():
    logits, labels = jnp.zeros((3, 3)), jnp.arange(3)
    assert Accuracy.from_logits(logits, labels).compute() == pytest.approx(1 / 3)
    assert int(TopK.from_logits(logits, labels, 2).total) == 2


def test_nan_logits_and_unknown_labels_are_wrong():
    logits = jnp.array([[jnp.nan] * 3, [jnp.nan, 1.0, 0.0], [9.0, 1.0, 0.0], [9.0, 1.0, 0.0]])
    hits = metrics.mean.is_among_top(logits, jnp.array([0, 1, 3, -1]), 1)
    assert not hits.any()


def test_confusion_ignores_unknown_classes():
    matrix = ConfusionMatrix.of(jnp.array([0, 5]), jnp.array([1, 1]), 2)
    np.testing.assert_array_equal(matrix.compute(), [[0, 1], [0, 0]])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="differ in shape"):
        Mean.of(jnp.zeros(3), valid=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix.of(jnp.zeros(3, int), jnp.zeros(2, int), 4)
    with pytest.raises(ValueError, match=r"\[b, v\]"):
        Accuracy.from_logits(jnp.zeros((2, 3)), jnp.zeros(3, int))
    with pytest.raises(ValueError, match="at least 1"):
        TopK.from_logits(jnp.zeros((2, 3)), jnp.zeros(2, int), 0)


def test_merge_refuses_other_names():
    with pytest.raises(ValueError, match="names differ"):
        metrics.merge({"a": Mean.of(jnp.ones(1))}, {"b": Mean.of(jnp.ones(1))})


def test_states_satisfy_the_contract():
    state = Mean.of(jnp.ones(2))
    assert isinstance(state, metrics.Metric)
    assert len(jax.tree.leaves(state)) == 2
