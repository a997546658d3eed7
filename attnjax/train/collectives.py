# SPDX-License-Identifier: Apache-2.0
"""Count and size the collectives of a compiled step by reading its HLO text.

XLA's own cost analysis counts a loop body once, so the executions of every computation are worked
out here: from the entry downwards, a `while` multiplies by its trip count.
"""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([^\s=]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|branch_computations)=\{?(%?[^\s,}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      bytes: payload on one device in one execution: the gathered result of an all-gather, the input
        of a reduce-scatter, the buffer itself otherwise.
      group: devices that exchange data with each other.
      executions: how often one step runs it, loops counted with their trip count.
    """

    kind: str
    bytes: int
    group: int
    executions: int


def read(text: str) -> list[Collective]:
    """List the collectives of an optimised HLO module, as printed by `compiled.as_text()`.

    Asynchronous pairs count once. A loop whose trip count the text does not reveal counts once too.

    Args:
      text: the HLO module of one partition.

    Returns:
      One entry per collective instruction that the entry computation can reach.
    """
    computations, entry = _split(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions.group(1)) if partitions else 1
    executions = collections.Counter({entry: 1})
    # A callee is printed before its caller, so walking backwards sees every caller first.
    for name in reversed(computations):
        for _, opcode, line in computations[name]:
            if opcode.endswith(("-done", "-update")):
                continue
            factor = _trip_count(line, computations) if opcode == "while" else 1
            for callee in _callees(line):
                executions[callee] += executions[name] * factor
    found = []
    for name, instructions in computations.items():
        for shape, opcode, line in instructions:
            kind = opcode.removesuffix("-start")
            if kind not in KINDS or not executions[name]:
                continue
            size, group = _payload(shape, opcode), _group(line, devices)
            # TPU spells a reduce-scatter as a computation of this name around an all-reduce.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                size *= group
            found.append(Collective(kind, size, group, executions[name]))
    return found


def total(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Add up collectives by kind.

    Returns:
      kind -> `count` (instructions), `executions` (per step), `bytes` (per device and step).
    """
    sums = {}
    for kind in KINDS:
        chosen = [item for item in found if item.kind == kind]
        if chosen:
            sums[kind] = {
                "count": len(chosen),
                "executions": sum(item.executions for item in chosen),
                "bytes": sum(item.executions * item.bytes for item in chosen),
            }
    return sums


def _split(text):
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and "->" in line:
            current = header.group(1)
            computations[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current is not None:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                shape, rest = _take_shape(line[instruction.end() :])
                computations[current].append((shape, rest.partition("(")[0], line))
    return computations, entry


def _take_shape(text):
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = end = 0
    while end == 0 or depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    return text[:end], text[end + 1 :]


def _callees(line):
    branches = _BRANCHES.search(line)
    names = branches.group(1).split(",") if branches else _CALLED.findall(line)
    return [name.strip().lstrip("%") for name in names]


def _trip_count(line, computations):
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([^\s,}]+)", line)
    body = computations.get(condition.group(1), ()) if condition else ()
    if not any("direction=LT" in text for _, _, text in body):
        return 1
    limits = [re.search(r" = s(?:32|64)\[\]\S* constant\((\d+)\)", text) for _, _, text in body]
    limits = [int(limit.group(1)) for limit in limits if limit]
    return limits[0] if len(limits) == 1 else 1


def _payload(shape, opcode):
    parts = _elements(shape)
    # These start with a tuple (input, output, ...); a started all-reduce keeps its plain shape.
    paired = opcode in ("all-gather-start", "collective-permute-start")
    if paired and len(parts) > 1:
        return _bytes(parts[1])
    return sum(map(_bytes, parts))


def _elements(shape):
    """Split a tuple shape at its outermost commas."""
    shape = re.sub(r"/\*.*?\*/", "", shape)
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(shape):
    size = 0
    for kind, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape)):
        bits = _BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits.group()) if digits else 0
        count = math.prod(int(d) for d in dims.split(",") if d)
        size += math.ceil(count * bits / 8)
    return size


def _group(line, devices):
    """Size of the first replica group, in any of the three notations XLA prints."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if iota:
        return int(iota.group(2))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
        axes = re.findall(r"'([^']+)'", named.group(2))
        return math.prod(int(sizes.get(axis, 1)) for axis in axes)
    pairs = re.search(r"source_target_pairs=", line)
    return 2 if pairs else devices
