"""HBM traffic of an optimized TPU program, from its text: ``python hbm_traffic.py PROGRAM.txt``.

Every operation of the schedule reads its operands and writes its results once. What the compiler
has put into the chip's fast memory (space ``S(1)``) is left out, its prefetches are counted, and
arrays count with the padding of their tiles. The body of a loop counts once: in the training
program that is one step. An upper bound: a fusion that needs a slice of an operand counts all of
it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import re
from pathlib import Path

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
}  # fmt: skip
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota",
    "copy-done", "slice-done", "async-done", "custom-call:ConcatBitcast",
    "custom-call:AllocateBuffer",
}  # fmt: skip
PREFETCHES = {"copy-start", "slice-start", "async-start"}
CALLS = {"while": r"body=%([\w.-]+)", "call": r"to_apply=%([\w.-]+)"}

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")
_ARRAY = re.compile(r"(" + "|".join(BYTES) + r")\[([\d,]*)\](?:\{([^{}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the schedule: its name, kind, result, and the bytes it moves."""

    name: str
    kind: str
    result: str
    traffic: float


def hbm_operations(program: str) -> list[Operation]:
    """Operations of the optimized HLO text ``compiled.as_text()`` that touch HBM."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return _operations(computations, entry)


def hbm_bytes(program: str) -> float:
    """Bytes that a program moves, see the module."""
    return sum(operation.traffic for operation in hbm_operations(program))


def padded_hbm_bytes(shape: str) -> float:
    """Bytes in HBM of every array in a shape's text, tiles filled up; 0 in fast memory."""
    total = 0.0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if "S(1)" in layout:
            continue
        dims = [int(size) for size in sizes.split(",") if size]
        tile = re.match(r"([\d,]*):T\(([\d,]+)\)", layout)
        if tile and dims:
            order = [int(axis) for axis in tile[1].split(",")]  # minor first
            minor = [dims[axis] for axis in order]
            tiles = [int(size) for size in tile[2].split(",")][::-1]
            minor += [1] * (len(tiles) - len(minor))
            dims = [-(-d // t) * t for d, t in zip(minor, tiles, strict=False)]
            dims += minor[len(tiles) :]
        total += math.prod(dims) * BYTES[dtype]
    return total


def _operations(computations: dict[str, list[str]], name: str) -> list[Operation]:
    found, shapes = [], {}
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        instruction, shape, kind, operands = match.groups()
        shapes[instruction] = shape
        if kind in CALLS:
            called = re.search(CALLS[kind], line)
            found += _operations(computations, called[1]) if called else []
            continue
        if detail := re.search(r'custom_call_target="([^"]+)"|, kind=k(\w+)', line):
            kind = f"{kind}:{detail[1] or detail[2]}"
        if kind in FREE:
            continue
        if kind in PREFETCHES:  # (destination, source, ...): one of them is in HBM
            traffic = padded_hbm_bytes("".join(m[0] for m in list(_ARRAY.finditer(shape))[:2]))
        else:
            names = re.findall(r"%([\w.-]+)", operands)
            traffic = padded_hbm_bytes(shape)
            traffic += sum(padded_hbm_bytes(shapes.get(operand, "")) for operand in names)
        if traffic:
            found.append(Operation(instruction, kind, shape, traffic))
    return found


def main() -> None:
    """Print the sum and what moves most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("--rows", type=int, default=30)
    args = parser.parse_args()
    found = hbm_operations(args.program.read_text())
    print(f"{sum(o.traffic for o in found) / 1e9:.2f} GB")
    groups: dict[tuple[str, str], list[Operation]] = collections.defaultdict(list)
    for operation in found:
        groups[operation.kind, re.sub(r"\{[^}]*\}", "", operation.result)].append(operation)
    heaviest = sorted(groups.items(), key=lambda item: -sum(o.traffic for o in item[1]))
    for (kind, result), members in heaviest[: args.rows]:
        traffic = sum(o.traffic for o in members) / 1e9
        print(f"{traffic:7.2f} GB  {len(members):3} x {kind}  {result[:100]}  ({members[0].name})")


if __name__ == "__main__":
    main()
