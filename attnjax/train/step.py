# SPDX-License-Identifier: Apache-2.0
"""One optimiser step as a pure function of state and batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from attnjax.recipe import Recipe
from attnjax.tasks.task import Task
from attnjax.train.optimizer import make_optimizer, make_schedule
from attnjax.train.state import GuardState, TrainState
from attnjax.typing import Array, Batch, Params, PRNGKey

_SPIKE_WARMUP = 50
"""Healthy steps before a loss can count as a spike: before that the statistics mean little."""

_SPIKE_MEMORY = 0.98
"""Decay of the running mean and variance of the loss."""


def make_init(task: Task, recipe: Recipe) -> Callable[[PRNGKey], TrainState]:
    """Return `init(key) -> TrainState` for a task and recipe; pure, to be jitted with shardings."""
    optimizer = make_optimizer(recipe.optim, recipe.steps)

    def init(key: PRNGKey) -> TrainState:
        init_key, run_key = jax.random.split(key)
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(task.example(1)))
        params = task.init(init_key, example)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if recipe.optim.ema else (),
            key=run_key,
            guard=GuardState.zero(),
        )

    return init


def make_step(
    task: Task, recipe: Recipe
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return `step(state, batch) -> (state, metrics)`; pure, to be jitted with shardings.

    Gradients are averaged over `optim.accumulate` microbatches. A step whose loss or gradient is
    not finite (or, with `guard.spike_sigma`, whose loss is a spike) changes nothing but `step` and
    the guard's own count. Metrics are float32 scalars: the task's, and `loss`, `grad_norm`, `lr`,
    `skipped`, `bad_steps`.
    """
    optimizer = make_optimizer(recipe.optim, recipe.steps)
    schedule = make_schedule(recipe.optim, recipe.steps)
    optim, guard = recipe.optim, recipe.guard

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, metrics), grads = _gradients(task, state, batch, key, optim.accumulate)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if optim.ema:
            ema = optax.incremental_update(params, state.ema, 1 - optim.ema)
        healthy = _healthy(state.guard, loss, grad_norm, guard.spike_sigma)
        if guard.skip:
            params, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(healthy, new, old),
                (params, opt_state, ema),
                (state.params, state.opt_state, state.ema),
            )
        new_guard = _observe(state.guard, loss, healthy)
        # The optimiser's own count, which its schedule follows: skipped updates are not in it.
        updates_taken = state.guard.count if guard.skip else state.step
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": jnp.asarray(schedule(updates_taken), jnp.float32),
            "skipped": 1.0 - healthy.astype(jnp.float32),
            "bad_steps": new_guard.bad_steps.astype(jnp.float32),
        }
        state = TrainState(state.step + 1, params, opt_state, ema, state.key, new_guard)
        return state, metrics

    return step


def _gradients(task: Task, state: TrainState, batch: Batch, key: PRNGKey, parts: int):
    """Average loss, metrics and gradients over `parts` interleaved microbatches."""

    def loss_fn(params: Params, microbatch: Batch, microkey: PRNGKey):
        return task.loss(params, microbatch, microkey, state.step)

    differentiate = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return differentiate(state.params, batch, key)
    # Row i goes to microbatch i % parts, so that every device keeps the rows it already holds.
    split = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch)
    )

    def add(total, part):
        index, microbatch = part
        result = differentiate(state.params, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, result), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(differentiate, state.params, first, key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zero, (jnp.arange(parts), split))
    return jax.tree.map(lambda x: x / parts, total)


def _healthy(guard: GuardState, loss: Array, grad_norm: Array, sigma: float) -> Array:
    healthy = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if sigma:
        limit = guard.loss_mean + sigma * jnp.sqrt(guard.loss_variance)
        healthy &= (guard.count < _SPIKE_WARMUP) | (loss <= limit)
    return healthy


def _observe(guard: GuardState, loss: Array, healthy: Array) -> GuardState:
    loss = loss.astype(jnp.float32)
    # Plain averages until the exponential window is full, so that early statistics are unbiased.
    count = guard.count + 1
    rate = jnp.maximum(1 - _SPIKE_MEMORY, 1 / count.astype(jnp.float32))
    delta = loss - guard.loss_mean
    mean = guard.loss_mean + rate * delta
    variance = (1 - rate) * (guard.loss_variance + rate * delta**2)
    seen = GuardState(jnp.zeros_like(guard.bad_steps), count, mean, variance)
    bad = GuardState(guard.bad_steps + 1, guard.count, guard.loss_mean, guard.loss_variance)
    return jax.tree.map(lambda a, b: jnp.where(healthy, a, b), seen, bad)
