# SPDX-License-Identifier: Apache-2.0
"""Speed of a recipe's training step: against its own data pipeline, and against a peer."""

import dataclasses
import os
import time
from typing import Any

import jax
import numpy as np

from attnjax.data import throughput as data_throughput
from attnjax.nn.generation import write
from attnjax.parallel import make_mesh
from attnjax.recipe import Recipe
from attnjax.timing import alternate
from attnjax.train import peers
from attnjax.train.program import build


def measure(
    recipe: Recipe, *, peer: str = "", with_data: bool = True, seconds: float = 60.0
) -> dict[str, Any]:
    """Measure examples per second of the step, the forward pass, the data and a peer.

    Args:
      recipe: a validated recipe; all devices are used as its mesh says.
      peer: name of a peer to alternate with (see `attnjax.train.peers`), or empty.
      with_data: also measure the recipe's data pipeline alone.
      seconds: time spent on each comparison.

    Returns:
      A JSON-ready dict: `device`, `batch`, `parameters`, `compile_seconds`, and for each of
      `forward`, `step` and, with a decoder, `decode` (`peers.DECODED` tokens) the median seconds
      and examples per second of ours and of the peer, and `ratio`, the peer's time over ours (above
      1: we are faster); `data` with examples per second, and `data_ratio`, how many times faster
      data is made than consumed.

    Raises:
      RecipeError: the recipe does not fit the devices or the data, or the peer is missing.
    """
    rival = peers.build(peer, recipe, os.cpu_count() or 1) if peer else None
    mesh = make_mesh(dataclasses.asdict(recipe.mesh))
    program = build(recipe, mesh)
    record: dict[str, Any] = {
        "model": {k: v for k, v in recipe.model.items() if v not in ("", None)},
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "batch": recipe.batch,
        "parameters": program.parameter_count,
        "peer": rival.name if rival else "",
        "peer_parameters": rival.parameters if rival else 0,
        "jax": jax.__version__,
    }
    with jax.set_mesh(mesh):
        ours = _ours(program, record)
        for name in ours:
            contestants = {"ours": ours[name]}
            if rival:
                contestants["peer"] = getattr(rival, name)
            timings = alternate(contestants, rounds=100, warmup=2, budget=seconds)
            record[name] = {
                who: {**t.to_dict(), "examples_per_second": recipe.batch / t.median}
                for who, t in timings.items()
            }
            if rival:
                record[name]["ratio"] = timings["peer"].ratio(timings["ours"])
    if with_data:
        (made,) = data_throughput.measure(recipe.data, recipe.batch, seed=recipe.seed)
        record["data"] = dataclasses.asdict(made)
        consumed = record["step"]["ours"]["examples_per_second"]
        record["data_ratio"] = made.examples_per_second / consumed
    return record


def _ours(program, record):
    """Compile forward pass and step on a fixed random batch; note the compile times."""
    rng, model = np.random.default_rng(0), program.task.model
    classes = getattr(model, "num_classes", getattr(model, "vocab_size", 2))
    batch = {
        name: np.ones(x.shape, x.dtype)
        if name == "segments"
        else rng.integers(0, classes, x.shape).astype(x.dtype)
        if np.issubdtype(x.dtype, np.integer)
        else rng.standard_normal(x.shape).astype(x.dtype)
        for name, x in program.batch.items()
    }
    prompt = batch["tokens"][:, : peers.PROMPT] if hasattr(model, "empty_cache") else None
    batch = program.to_device(batch)
    state = program.init()
    predict = jax.jit(program.task.predict)
    begun = time.perf_counter()
    forward = predict.lower(state.params, batch).compile()
    middle = time.perf_counter()
    step = program.step.lower(state, batch).compile()
    record["compile_seconds"] = {
        "forward": round(middle - begun, 1),
        "step": round(time.perf_counter() - middle, 1),
    }
    record["temporary_bytes"] = {
        "forward": forward.memory_analysis().temp_size_in_bytes,
        "step": step.memory_analysis().temp_size_in_bytes,
    }
    params = jax.tree.map(lambda x: x.copy(), state.params)
    holder = [state]

    def run_step():
        # The old state is donated, as in training.
        holder[0], metrics = step(holder[0], batch)
        return jax.block_until_ready(metrics["loss"])

    runs = {"forward": lambda: jax.block_until_ready(forward(params, batch)), "step": run_step}
    if prompt is not None:
        decode = jax.jit(lambda params, prompt: write(model, params, prompt, peers.DECODED))
        begun = time.perf_counter()
        decode = decode.lower(params, prompt).compile()
        record["compile_seconds"]["decode"] = round(time.perf_counter() - begun, 1)
        runs["decode"] = lambda: jax.block_until_ready(decode(params, prompt))
    return runs


def render(record: dict[str, Any]) -> str:
    """Return the table that `launch.benchmark --suite=training` prints."""
    lines = [
        f"{record['device']}, {record['cores']} cores, batch {record['batch']}, "
        f"{record['parameters']:,} parameters"
        + (f"; peer {record['peer']}, {record['peer_parameters']:,}" if record["peer"] else ""),
        f"{'':10}{'ours ms':>10}{'20-80 %':>18}{'ex/s':>9}{'peer ms':>10}{'20-80 %':>18}"
        f"{'peer/ours':>11}",
    ]
    for name in (n for n in ("forward", "step", "decode") if n in record):
        row = record[name]
        cells = [f"{name:10}"]
        for who in ("ours", "peer"):
            if who in row:
                t = row[who]
                spread = f"{1e3 * t['low']:.0f}-{1e3 * t['high']:.0f}"
                cells.append(f"{1e3 * t['median']:10.1f}{spread:>18}")
                if who == "ours":
                    cells.append(f"{t['examples_per_second']:9.1f}")
        if "ratio" in row:
            cells.append(f"{row['ratio']:11.2f}")
        lines.append("".join(cells))
    if "data" in record:
        lines.append(
            f"data      {record['data']['examples_per_second']:.0f} examples/s alone, "
            f"{record['data_ratio']:.1f} x what the step consumes"
        )
    compiled = (f"{seconds} s ({name})" for name, seconds in record["compile_seconds"].items())
    lines.append(f"compiled in {', '.join(compiled)}")
    return "\n".join(lines)
