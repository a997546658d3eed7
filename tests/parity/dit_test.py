# SPDX-License-Identifier: Apache-2.0
"""DiT and MoH-DiT against the released code: networks, guidance, losses, steps back."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from attnjax.models import dit
from attnjax.models.load import abstract_params, build
from attnjax.ops import diffusion
from attnjax.ops import learned_variance as variance
from attnjax.weights import flatten, import_params

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens/dit.npz"

FIELDS = {"num_classes": 3, "image_size": 6, "channels": 3, "width": 24, "mlp_ratio": 2.0}
KINDS = {
    "dense": {"depth": 2, "num_heads": 3},
    "mixed": {"depth": 3, "head_dim": 6, "mixture": ((1, 4, 2, 1), (1, 4, 0, 2), (1, 3, 3, 0))},
}
NETWORK = 1e-4  # float32 through a few blocks with weights of 0.3, relative to the largest
FLOAT32 = 1e-4  # of a bound, which loses digits where variances are small, relative


@functools.cache
def golden():
    return dict(np.load(GOLDENS, allow_pickle=False))


@functools.cache
def make(kind):
    made = {k.partition("/")[2]: x for k, x in golden().items() if k.startswith(f"{kind}/")}
    model, tensors, start = build("dit", **FIELDS | KINDS[kind]), {}, 0
    for name, axes in zip(made["names"], made["shapes"], strict=True):
        shape = [int(x) for x in axes if x]
        size = int(np.prod(shape))
        tensors[str(name)] = made["weights"][start : start + size].reshape(shape)
        start += size
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(model)).items()}
    params = import_params(tensors, shapes, dit.TORCH_NAMES)
    run = jax.jit(lambda *x: model.apply({"params": params}, *x).prediction)
    return made, lambda *x: np.asarray(run(*x))


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=NETWORK * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_network_and_guidance(kind):
    """Weights by their released names; the last label is "no class"."""
    made, run = make(kind)
    noisy, time = made["noisy"].astype(np.float32), made["time"].astype(np.float32)
    close(run(noisy, time, made["label"].astype(np.int32)), made["prediction"])
    # The release takes the same two pictures with and without a class, and guides 3 channels.
    answers = run(noisy[[0, 1, 0, 1]], time[[1] * 4], np.array([0, 1, 3, 3], np.int32))
    close(variance.guide(answers[:2], answers[2:], 1.5, 3), made["guided"])


def linear_levels():
    return diffusion.signal_levels(diffusion.betas("linear", 1_000, first=1e-4, last=2e-2))


def test_losses():
    made = golden()
    clean, noise, answer = (made[n].astype(np.float32) for n in ("clean", "noise", "answer"))
    at = variance.at_time(variance.learned_steps(linear_levels()), made["times"], 4)
    noisy = diffusion.q_sample(clean, noise, at.step.level[:, 0, 0, 0])
    squares, bound = variance.losses(clean, noisy, noise, answer[..., :2], answer[..., 2:], at)
    np.testing.assert_allclose(squares, made["squares"], rtol=FLOAT32)
    np.testing.assert_allclose(bound, made["bound"], rtol=20 * FLOAT32)
    np.testing.assert_allclose(bound[1:], made["bound"][1:], rtol=2 * FLOAT32)


def test_shorter_samplers():
    made = golden()
    for count in (2, 163, 250):
        np.testing.assert_array_equal(variance.space_times(1_000, count), made[f"times/{count}"])
    steps = variance.learned_steps(linear_levels(), variance.space_times(1_000, 250))
    at = variance.at_time(steps, np.array([0, 1, 100, 249]), 4)
    answer = made["answer"].astype(np.float32)
    mean, log_variance = variance.moments(
        made["noise"].astype(np.float32), answer[..., :2], answer[..., 2:], at
    )
    close(mean, made["mean"])
    close(log_variance, made["log_variance"])
