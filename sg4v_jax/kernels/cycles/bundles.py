"""Reads the compiler's dump: bundles of instructions, of which only scalar ones matter in detail."""

import collections
import dataclasses
import re

from sg4v_jax.kernels.cycles.target import SCHEDULE, UTILIZATION

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*(?:LH|LB|LE|PB|PF|CT)?\s*:[ >]*\{(.*)\}\s*$")
_INSTRUCTION = re.compile(r"(?:(%\w+)\s*=\s*)?([A-Za-z][\w.<-]*)\s*(.*)$", re.S)
_CALL = re.compile(r"(%\d+) = inlined_call\b[^/}]*/\* %?([\w.<>-]+)")
REGISTER = re.compile(r"%([svp])\d+_([svpm]+\d+)")
# Meanings that the dump puts into comments, but that tell operands of transfers apart.
_MEANINGS = {
    "size_in_granules": "@size ",
    "dst_syncflagno": "@flag ",
    "hbm": "@hbm ",
    "src": "@hbm ",
    "smem": "@smem ",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A scalar instruction: its name, the register it writes (`s5`, `p3`) and the text of its operands."""

    name: str
    register: str | None
    operands: str


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel or fusion.

    Attributes:
      name: as in the HLO.
      bundles: scalar instructions per bundle.
      matmuls: number of matrix products started per bundle, those of float32 for one half.
      slots: names of the units and how many of each a bundle has.
      use: per bundle, how many of each it uses.
    """

    name: str
    bundles: list[list[Instruction]]
    matmuls: list[float]
    slots: dict[str, int]
    use: list[list[int]]


def parse(name: str, texts: dict[str, str]) -> Program:
    """Reads one program's dumps."""
    text = texts[SCHEDULE]
    callees = {result: callee for result, callee in _CALL.findall(text)}
    for meaning, tag in _MEANINGS.items():
        text = text.replace(f"/*{meaning}=*/", tag)
    bundles: list[list[Instruction]] = []
    matmuls: list[float] = []
    for line in _without_comments(text).split("\n"):
        match = _BUNDLE.match(line)
        if not match:
            continue
        if int(match.group(1), 16) != len(bundles):
            raise ValueError(f"{name}: bundle {match.group(1)} follows {len(bundles) - 1:#x}")
        scalar, products = [], 0.0
        for part in match.group(2).split(";;"):
            found = _INSTRUCTION.match(part.strip())
            if not found:
                continue
            target, op, rest = found.groups()
            if op.startswith(("vmatmul", "vdwg")):
                products += 0.5 if ".f32" in op else 1
            elif op == "inlined_call":
                scalar.append(Instruction(op, None, callees.get(target, "?")))
            elif op.startswith(("sst", "sbr", "dma", "vsyncadd")):
                scalar.append(Instruction(op, None, rest))
            elif target and (register := REGISTER.match(target)) and register.group(1) in "sp":
                scalar.append(Instruction(op, register.group(2), rest))
        bundles.append(scalar)
        matmuls.append(products)
    slots, use = _utilization(texts.get(UTILIZATION, ""), len(bundles))
    return Program(name, bundles, matmuls, slots, use)


def _without_comments(text: str) -> str:
    """Comments nest and span lines."""
    kept, depth, start = [], 0, 0
    for mark in re.finditer(r"/\*|\*/", text):
        if mark.group() == "/*":
            if depth == 0:
                kept.append(text[start : mark.start()])
            depth += 1
        elif depth:
            depth -= 1
            start = mark.end()
    if depth == 0:
        kept.append(text[start:])
    return "".join(kept)


def _utilization(text: str, size: int) -> tuple[dict[str, int], list[list[int]]]:
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 4:
        return {}, []
    slots = dict(zip((name.strip() for name in lines[1].split(",")), map(int, lines[2].split()), strict=True))
    use = [[int(n) for n in line.split()] for line in lines[4:] if line[0].isdigit()]
    return (slots, use) if len(use) == size else ({}, [])


def same_programs(text: str) -> dict[str, str]:
    """From the deduplication map: program name to the name of the one that stands for it."""
    result = collections.OrderedDict[str, str]()
    for entry in text.split("key:")[1:]:
        key, _, names = entry.partition("\n")
        result.update((name, key) for name in re.findall(r"^  (\S+)$", names, re.M))
    return result
