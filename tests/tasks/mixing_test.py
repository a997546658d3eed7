# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix: properties, distributions, and agreement with timm for the same draw."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnjax.losses import soft_targets
from attnjax.tasks.mixing import blend, cut_box, mix

FLOAT32_ROUNDING = 1e-6
"""One product and one sum in float32."""

DRAWS = 4000
STANDARD_ERRORS = 4
"""Sample means lie within four standard errors of their expectation; keys are fixed."""


@pytest.fixture(scope="module")
def batch():
    images = jax.random.normal(jax.random.key(0), (8, 6, 5, 3))
    return images, soft_targets(jnp.arange(8), 10, label_smoothing=0.1)


def test_off_leaves_the_batch_alone(batch):
    images, targets = mix(jax.random.key(0), *batch)
    assert images is batch[0] and targets is batch[1]


def test_probability_zero_leaves_the_values_alone(batch):
    mixed = mix(jax.random.key(0), *batch, mixup=0.8, cutmix=1.0, probability=0.0)
    jax.tree.map(np.testing.assert_array_equal, mixed, batch)


def test_mixup_is_the_convex_combination_with_the_mirrored_batch(batch):
    images, targets = batch
    mixed, mixed_targets = mix(jax.random.key(4), images, targets, mixup=0.8)
    share = (mixed - images[::-1]) / (images - images[::-1])
    np.testing.assert_allclose(share, share[0, 0, 0, 0], atol=1e-3)
    lam = float(jnp.median(share))
    expected = lam * targets + (1 - lam) * targets[::-1]
    np.testing.assert_allclose(mixed_targets, expected, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_a_box_and_weighs_targets_by_its_area(batch, seed):
    images, targets = batch
    mixed, mixed_targets = mix(jax.random.key(seed), images, targets, cutmix=1.0)
    pasted = np.asarray(jnp.all(mixed == images[::-1], axis=(0, 3)))
    kept = np.asarray(jnp.all(mixed == images, axis=(0, 3)))
    assert np.all(pasted ^ kept)
    rows, columns = pasted.any(1), pasted.any(0)
    np.testing.assert_array_equal(pasted, rows[:, None] & columns[None, :])
    assert np.abs(np.diff(rows.astype(int))).sum() <= 2
    share = 1 - pasted.mean()
    expected = share * targets + (1 - share) * targets[::-1]
    np.testing.assert_allclose(mixed_targets, expected, atol=FLOAT32_ROUNDING)


def test_targets_stay_distributions_and_dtypes_stay(batch):
    images, targets = batch
    mixed, mixed_targets = mix(
        jax.random.key(0), images.astype(jnp.bfloat16), targets, mixup=0.8, cutmix=1.0
    )
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed_targets.sum(-1), 1, atol=FLOAT32_ROUNDING)


def test_sharded_batch_gives_the_same_numbers(batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    mixing = jax.jit(lambda key, x, y: mix(key, x, y, mixup=0.8, cutmix=1.0))
    for seed in range(3):
        whole = mixing(jax.random.key(seed), *batch)
        split = mixing(jax.random.key(seed), *sharded)
        for a, b in zip(whole, split, strict=True):
            np.testing.assert_allclose(a, b, atol=FLOAT32_ROUNDING)


@functools.cache
def compiled_draws():
    """Compile many draws once; only the probabilities vary between tests."""

    def share(key, probability, switch_probability):
        mixed = mix(
            key,
            jnp.zeros((2, 16, 16, 1)),
            jnp.eye(2),
            mixup=0.8,
            cutmix=1.0,
            probability=probability,
            switch_probability=switch_probability,
        )
        return mixed[1][0, 0]

    return jax.jit(jax.vmap(share, in_axes=(0, None, None)))


def draw_shares(probability, switch_probability):
    """Return the share of the own target in many draws."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(compiled_draws()(keys, probability, switch_probability))


def test_mixup_shares_follow_the_beta_distribution():
    shares = draw_shares(probability=1.0, switch_probability=0.0)
    variance = 1 / (4 * (2 * 0.8 + 1))
    error = STANDARD_ERRORS * np.sqrt(variance / DRAWS)
    assert abs(shares.mean() - 0.5) < error
    assert abs(shares.var() - variance) < error


def test_probabilities_are_honoured():
    error = STANDARD_ERRORS * 0.5 / np.sqrt(DRAWS)
    untouched = draw_shares(probability=0.3, switch_probability=0.0) == 1.0
    assert abs(untouched.mean() - 0.7) < error
    # Areas of a 16 x 16 box are multiples of 1/256; mixup's shares almost never are.
    shares = draw_shares(probability=1.0, switch_probability=0.25) * 256
    assert abs((shares == np.round(shares)).mean() - 0.25) < error


def test_box_of_an_empty_cut_is_empty_and_of_a_full_cut_covers_from_the_centre():
    key = jax.random.key(0)
    assert not cut_box(key, 8, 8, jnp.float32(1.0)).any()
    assert cut_box(key, 8, 8, jnp.float32(0.0)).sum() >= 16


def test_odd_batches_mix_the_middle_with_itself():
    images = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    mixed, targets = mix(jax.random.key(1), images, jnp.eye(3), mixup=1.0)
    np.testing.assert_allclose(mixed[1], images[1], atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(targets[1], [0, 1, 0], atol=FLOAT32_ROUNDING)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[b, y, x, c\]"):
        mix(jax.random.key(0), jnp.zeros((2, 3)), jnp.eye(2), mixup=1.0)


def load_timm_mixup():
    """Load timm's file alone: its package imports torchvision, which the file does not need."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    file = pathlib.Path(spec.origin).parent / "data" / "mixup.py"
    spec = importlib.util.spec_from_file_location("timm_mixup", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("use_cutmix", [False, True])
def test_same_draw_gives_the_numbers_of_timm(batch, use_cutmix):
    torch = pytest.importorskip("torch")
    timm_mixup = load_timm_mixup()
    images, labels = batch[0], np.arange(8)
    np.random.seed(3)
    their_mixup = timm_mixup.Mixup(
        mixup_alpha=0.0 if use_cutmix else 0.8,
        cutmix_alpha=1.0 if use_cutmix else 0.0,
        label_smoothing=0.1,
        num_classes=10,
    )
    nchw = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())
    theirs, their_targets = their_mixup(nchw, torch.tensor(labels))
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    if use_cutmix:
        own = 1.0 - (theirs == np.asarray(images[::-1])).all((0, 3)).astype(np.float32)
    else:
        np.random.seed(3)
        lam, _ = their_mixup._params_per_batch()
        own = np.full((6, 5), lam, np.float32)
    mine, my_targets = blend(images, soft_targets(labels, 10, label_smoothing=0.1), jnp.array(own))
    np.testing.assert_allclose(mine, theirs, atol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(my_targets, their_targets.numpy(), atol=FLOAT32_ROUNDING)
