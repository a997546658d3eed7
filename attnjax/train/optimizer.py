# SPDX-License-Identifier: Apache-2.0
"""Optimiser and learning-rate schedule of a recipe, assembled from optax."""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from attnjax.parallel.rules import leaf_path
from attnjax.recipe import Optim
from attnjax.typing import Params


def make_schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Linear warm-up from `warmup_lr` to `lr`, then the decay to `end_lr`, reached `cooldown` steps
    before the end and kept. Other decays, t steps after the warm-up:

        lr * sqrt(warmup / (warmup + t))                            "inverse_sqrt"
        max(lr * decay_rate^floor(t / decay_every), end_lr)         "step"

    Args:
      optim: the recipe's optimiser section.
      steps: length of the run.

    Returns:
      A function from step to learning rate.
    """
    body = max(1, steps - optim.warmup - optim.cooldown)
    if optim.decay == "cosine":
        decay = optax.cosine_decay_schedule(optim.lr, body, alpha=optim.end_lr / optim.lr)
    elif optim.decay == "linear":
        decay = optax.linear_schedule(optim.lr, optim.end_lr, body)
    elif optim.decay == "inverse_sqrt":
        start = max(1, optim.warmup)
        # Joined schedules are asked about steps before their own, too.
        decay = lambda later: optim.lr * jnp.sqrt(start / (start + jnp.maximum(later, 0)))
    elif optim.decay == "step":
        decay = optax.exponential_decay(
            optim.lr, optim.decay_every, optim.decay_rate, staircase=True, end_value=optim.end_lr
        )
    else:
        decay = optax.constant_schedule(optim.lr)
    if not optim.warmup:
        return decay
    warmup = optax.linear_schedule(optim.warmup_lr, optim.lr, optim.warmup)
    return optax.join_schedules([warmup, decay], [optim.warmup])


def decayed(optim: Optim, params: Params) -> Params:
    """Tell which parameters weight decay applies to, as a tree of booleans.

    Vectors and scalars (biases, norm scales) are left out unless `decay_vectors` is set; so is
    every path that a pattern of `no_decay` finds.
    """

    def decide(key_path, leaf):
        if leaf.ndim < 2 and not optim.decay_vectors:
            return False
        return not any(re.search(pattern, leaf_path(key_path)) for pattern in optim.no_decay)

    return jax.tree.map_with_path(decide, params)


def make_optimizer(optim: Optim, steps: int) -> optax.GradientTransformation:
    """Return the recipe's optimiser: clipping, the update rule, decoupled decay, the schedule."""
    schedule = make_schedule(optim, steps)
    mask = functools.partial(decayed, optim)
    if optim.name == "adamw":
        rule = optax.adamw(
            schedule,
            optim.beta1,
            optim.beta2,
            optim.eps,
            weight_decay=optim.weight_decay,
            mask=mask,
        )
    elif optim.name == "lion":
        rule = optax.lion(
            schedule, optim.beta1, optim.beta2, weight_decay=optim.weight_decay, mask=mask
        )
    elif optim.name == "adafactor":
        rule = optax.adafactor(
            schedule, weight_decay_rate=optim.weight_decay or None, weight_decay_mask=mask
        )
    else:
        rule = optax.chain(
            optax.add_decayed_weights(optim.weight_decay, mask),
            optax.sgd(schedule, momentum=optim.momentum or None),
        )
    if optim.clip:
        return optax.chain(optax.clip_by_global_norm(optim.clip), rule)
    return rule
