# SPDX-License-Identifier: Apache-2.0
"""What is said about a compiled step whose program cannot be printed."""

import pathlib

import jax
import pytest

from attnjax.train import ahead_of_time
from attnjax.train.ahead_of_time import GIB, Compiled, render

REFUSAL = "INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands but sees 3"


class Unprintable:
    """A lowered step and its executable, as libtpu makes it of a large table of tokens."""

    def __init__(self, message, dumps=()):
        self.message, self.dumps = message, dict(dumps)

    def compile(self, compiler_options):
        for name, text in self.dumps.items():
            (pathlib.Path(compiler_options["xla_dump_to"]) / name).write_text(text)
        return self

    def as_text(self):
        raise jax.errors.JaxRuntimeError(self.message)


def compiled(collectives):
    return Compiled(
        topology="v5p:2x2x1", devices=4, mesh={"context": 4}, batch=1, parameters=10,
        arguments=GIB, outputs=0, temporaries=2 * GIB, peak=3 * GIB, memory=95 * GIB, flops=1e12,
        peak_flops=4 * 459e12, collectives=collectives, seconds=1.0,
    )  # fmt: skip


def test_memory_is_reported_without_the_collectives():
    assert ahead_of_time._compile(Unprintable(REFUSAL))[1] == ""
    text = render(compiled(None))
    assert "unknown: the compiler cannot print this program" in text
    assert "3.000" in text and "fits" in text
    assert compiled(None).to_dict()["collectives"] is None


def test_what_the_compiler_prints_itself_stands_in():
    dumps = {
        "module_0.jit_constant.after_optimizations.txt": "HloModule",
        "module_1.jit_step.after_optimizations.txt": "HloModule jit_step",
        "module_1.jit_step.before_optimizations.txt": "HloModule jit_step, far longer",
    }
    assert ahead_of_time._compile(Unprintable(REFUSAL, dumps))[1] == "HloModule jit_step"


def test_no_collectives_are_not_unknown_ones():
    assert "none" in render(compiled({})) and "unknown" not in render(compiled({}))
    counted = {"all-gather": {"count": 2, "executions": 64, "bytes": 2**21}}
    line = next(line for line in render(compiled(counted)).splitlines() if "all-gather" in line)
    assert line.split() == ["all-gather", "2", "64", "2.0"]


def test_other_failures_are_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        ahead_of_time._compile(Unprintable("out of memory"))
