# SPDX-License-Identifier: Apache-2.0
"""Compile a recipe's training step for a TPU topology on a machine that has no TPU.

The compiler in libtpu needs no device: it takes abstract arguments that are sharded over the
devices of a topology description and returns the executable with its memory plan.
"""

import dataclasses
import importlib.util
import os
import pathlib
import tempfile
import time
from typing import Any

import jax

from attnjax.errors import RecipeError
from attnjax.parallel import make_mesh
from attnjax.recipe import Recipe
from attnjax.train import collectives
from attnjax.train.program import build

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation, per device as JAX counts them.

    Attributes:
      accelerator: a small accelerator type of it, which libtpu wants to read from the environment.
      memory: bytes of high-bandwidth memory.
      peak: dense bfloat16 operations per second.
    """

    accelerator: str
    memory: int
    peak: float


# From cloud.google.com/tpu/docs; a v4 or v5p device is a chip, a tpu7x device is half of one.
CHIPS = {
    "v4": Chip("v4-8", 32 * GIB, 275e12),
    "v5e": Chip("v5litepod-4", 16 * GIB, 197e12),
    "v5p": Chip("v5p-8", 95 * GIB, 459e12),
    "v6e": Chip("v6e-4", 32 * GIB, 918e12),
    "tpu7x": Chip("tpu7x-8", 96 * GIB, 1153e12),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about one training step; sizes in bytes and per device.

    Attributes:
      topology: as given, such as "v5p:4x4x4".
      devices: number of devices.
      mesh: size per mesh axis.
      batch: examples per step over all devices.
      parameters: trained scalars, over all devices.
      arguments: state and batch.
      outputs: new state and metrics, without what reuses the arguments' memory.
      temporaries: activations and other intermediate values.
      peak: most memory in use at one moment.
      memory: what the chip has.
      flops: analytic operations of one step over all devices, recomputation left out.
      peak_flops: operations per second that all devices could do at best.
      collectives: kind -> count, executions per step, bytes per device and step; None where the
        compiler cannot print its program.
      seconds: compile time.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    batch: int
    parameters: int
    arguments: int
    outputs: int
    temporaries: int
    peak: int
    memory: int
    flops: float
    peak_flops: float
    collectives: dict[str, dict[str, int]] | None
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step's peak is within the device's memory."""
        return self.peak <= self.memory

    @property
    def ideal_seconds(self) -> float:
        """Time of a step if every device computed at its peak all the time: a lower bound."""
        return self.flops / self.peak_flops

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {**values, "ideal_seconds": self.ideal_seconds, "fits": self.fits}


def compile_step(recipe: Recipe, topology: str) -> Compiled:
    """Compile the training step of a recipe for a topology.

    Args:
      recipe: a validated recipe; its mesh is laid over the topology's devices.
      topology: generation and shape, such as "v5p:4x4x4" or "v5e:16x16".

    Returns:
      Memory, operations and collectives of the step.

    Raises:
      RecipeError: libtpu is missing, the topology is unknown, or the mesh does not fit it.
    """
    devices = _devices(topology)
    chip = CHIPS[topology.partition(":")[0]]
    mesh = make_mesh(dataclasses.asdict(recipe.mesh), devices)
    program = build(recipe, mesh)
    start = time.monotonic()
    try:
        # Kernels ask the ambient mesh which chip they are built for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = program.step.trace(program.state, program.batch)
            compiled, text = _compile(traced.lower(lowering_platforms=("tpu",)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
        raise RecipeError(f"does not fit {topology}: {reason}") from error
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    planned = memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes
    return Compiled(
        topology=topology,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        batch=recipe.batch,
        parameters=program.parameter_count,
        arguments=memory.argument_size_in_bytes,
        outputs=outputs,
        temporaries=memory.temp_size_in_bytes,
        peak=max(memory.peak_memory_in_bytes, 0) or planned,
        memory=chip.memory,
        flops=program.task.flops * recipe.batch,
        peak_flops=chip.peak * mesh.size,
        collectives=collectives.total(collectives.read(text)) if text else None,
        seconds=round(time.monotonic() - start, 1),
    )


def _compile(lowered):
    """Return the compiled program and its text, "" if there is no way to get it."""
    # What libtpu itself prints is read: jaxlib 0.10.2 refuses to parse some asynchronous updates,
    # such as SparseCore's gathers, that libtpu has written.
    with tempfile.TemporaryDirectory(prefix="attnjax-compile-") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        files = list(pathlib.Path(folder).glob("*.after_optimizations.txt"))
        if files:
            return compiled, max(files, key=lambda file: file.stat().st_size).read_text()
    try:
        return compiled, compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "async-update" not in str(error):
            raise
        return compiled, ""


def render(compiled: Compiled) -> str:
    """Return the table that `launch.compile` prints."""
    axes = ", ".join(f"{axis} {size}" for axis, size in compiled.mesh.items())
    lines = [
        f"{compiled.topology}: {compiled.devices} devices, mesh {axes}, "
        f"global batch {compiled.batch}, {compiled.parameters:,} parameters",
        "",
        "memory per device         GiB",
    ]
    lines += [
        f"  {name:20}{size / GIB:9.3f}"
        for name, size in (
            ("state and batch", compiled.arguments),
            ("new outputs", compiled.outputs),
            ("temporaries", compiled.temporaries),
            ("peak", compiled.peak),
            ("the chip has", compiled.memory),
        )
    ]
    share = compiled.peak / compiled.memory
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    lines += [f"  {verdict}: the peak is {share:.0%} of the chip's memory", ""]
    lines += ["collectives per step           count  executions  MiB per device"]
    if compiled.collectives is None:
        lines.append("  unknown: the compiler cannot print this program")
    else:
        lines += [
            f"  {kind:26}{sums['count']:8}{sums['executions']:12}{sums['bytes'] / 2**20:16.1f}"
            for kind, sums in compiled.collectives.items()
        ] or ["  none"]
    lines += [
        "",
        f"operations per step {compiled.flops:.3e} (analytic, without recomputation)",
        f"time per step at least {compiled.ideal_seconds * 1e3:.1f} ms: every device at its bf16 "
        "peak. No prediction: memory traffic, collectives and small shapes are not in it.",
        f"compiled in {compiled.seconds:.0f} s",
    ]
    return "\n".join(lines)


def _devices(topology):
    family, _, shape = topology.partition(":")
    if family not in CHIPS or not shape:
        raise RecipeError(
            f"--topology={topology!r}: must be one of {', '.join(CHIPS)} with a shape, such as "
            "v5p:4x4x4 or v5e:16x16"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise RecipeError("libtpu is missing; install it with: pip install 'attnjax[tpu-aot]'")
    # libtpu looks for a TPU machine around it unless it is told about one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", CHIPS[family].accelerator)
    # Two compilations at the same time are fine: neither holds a device.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise RecipeError(f"--topology={topology!r} is refused by libtpu: {error}") from error
    return description.devices
