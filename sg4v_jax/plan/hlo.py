"""What a compiled program does, read from its HLO text: how often each instruction runs, what it moves.

XLA's own cost analysis counts the body of a loop once and nothing of a kernel. Here every instruction is
weighted with the trip counts of the loops around it, so collectives and products inside the scan over
layers count once for each layer.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
    "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d\w*)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"(ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result.

    Attributes:
      dtype: as HLO writes it.
      dims: sizes.
      in_hbm: False if the compiler keeps it on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * _ITEM_BITS.get(self.dtype, 32) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: without the percent sign.
      opcode: `fusion`, `all-gather`.
      result: its arrays.
      operands: names.
      attributes: the text after the operands.
      root: whether it is what the computation gives.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.result)

    def called(self, kind: str = "") -> list[str]:
        """Computations it calls, or only those of one attribute."""
        found = _CALLED.findall(self.attributes)
        names = [text for attribute, text in found if not kind or attribute == kind]
        return [name for text in names for name in re.findall(r"%([\w.\-]+)", text)]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: instructions by computation, in the order of the schedule.
      entry: the computation that runs.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    def runs(self) -> dict[str, int]:
        """How often each computation runs in one run of the program.

        A branch of a conditional counts as if it were always taken, and a loop whose trip count can't
        be told as if it ran once; see `unknown_loops`.
        """
        runs: dict[str, int] = collections.defaultdict(int)

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self.computations.get(name, ()):
                trips = self.trips(instruction) or 1
                for called in instruction.called():
                    visit(called, times * trips)

        visit(self.entry, 1)
        return dict(runs)

    def unknown_loops(self) -> list[str]:
        """Loops whose trip count depends on data."""
        lines = (line for lines in self.computations.values() for line in lines)
        return [line.name for line in lines if line.opcode == "while" and self.trips(line) is None]

    def trips(self, instruction: Instruction) -> int | None:
        """Trip count of a loop; 1 for anything else, None if it can't be told."""
        if instruction.opcode != "while":
            return 1
        known = re.search(r'known_trip_count"?[=:]\s*\{"?n"?[=:]"?(\d+)', instruction.attributes)
        if known:
            return int(known[1])
        # A counter that is compared with a constant, and grows by a constant.
        lines = {line.name: line for line in self.computations[instruction.called("condition")[0]]}
        test = next((line for line in lines.values() if line.root), None)
        if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (lines.get(name) for name in test.operands)
        limit = _value(bound)
        index = _index(counter)
        if limit is None or index is None:
            return None
        rest = limit - self._first(instruction, index)
        return -(-rest // self._step(instruction.called("body")[0], index))

    def _first(self, loop: Instruction, index: int) -> int:
        """Where a loop's counter begins; 0 if it can't be told. Loops with steps peeled off begin later."""
        around = next(lines for lines in self.computations.values() if any(line is loop for line in lines))
        lines = {line.name: line for line in around}
        line = lines.get(loop.operands[0])
        if line is None or line.opcode != "tuple":
            return 0
        line = lines.get(line.operands[index])
        while line is not None and line.opcode in ("copy", "bitcast"):
            line = lines.get(line.operands[0])
        return _value(line) or 0

    def _step(self, body: str, index: int) -> int:
        """What a loop's body adds to a counter; 1 if it can't be told. Unrolled loops add more than 1."""
        lines = {line.name: line for line in self.computations[body]}
        root = next(line for line in lines.values() if line.root)
        name, step = root.operands[index], 0
        while line := lines.get(name):
            if line.opcode == "add":
                values = [_value(lines.get(operand)) for operand in line.operands]
                step += next((value for value in values if value is not None), 0)
                name = next((o for o, v in zip(line.operands, values, strict=True) if v is None), "")
            elif line.opcode in ("copy", "bitcast"):
                name = line.operands[0]
            else:
                break
        return step or 1

    def scheduled(self) -> Iterator[tuple[str, int, Instruction]]:
        """(computation, runs, instruction) of everything that the chip executes one after the other.

        What lies inside fusions is left out: they are one instruction each.
        """
        runs = self.runs()
        inside = {
            called
            for lines in self.computations.values()
            for line in lines
            if line.opcode not in ("while", "conditional", "call")
            for called in line.called()
        }
        for name, lines in self.computations.items():
            if name in runs and name not in inside:
                for line in lines:
                    yield name, runs[name], line


def parse(text: str) -> Module:
    """Reads HLO text.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and " = " not in line.split("(", 1)[0]:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":  # Metadata of kernels may break lines, and start one with "}}".
            current = None
        elif current is not None and (found := _NAME.match(line.strip())):
            current.append(_instruction(found, line.strip()[found.end() :]))
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: re.Match[str], rest: str) -> Instruction:
    shape, rest = _shape_text(rest)
    opcode, _, rest = rest.partition("(")
    operands, attributes = _split_operands(rest)
    return Instruction(
        name=name[2],
        opcode=opcode.strip(),
        result=tuple(_arrays(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        # Constants and parameters carry their value and number where others have operands.
        attributes=f"{operands}){attributes}" if opcode.strip() in ("constant", "parameter") else attributes,
        root=name[1] is not None,
    )


def _value(line: Instruction | None) -> int | None:
    """Of a constant."""
    found = re.match(r"(\d+)\)", line.attributes) if line and line.opcode == "constant" else None
    return int(found[1]) if found else None


def _index(line: Instruction | None) -> int | None:
    """Which element of a tuple it takes."""
    found = re.search(r"index=(\d+)", line.attributes) if line else None
    return int(found[1]) if found and line and line.opcode == "get-tuple-element" else None


def _shape_text(text: str) -> tuple[str, str]:
    """(the type, what follows)."""
    end = _closing(text) if text.startswith("(") else text.find(" ")
    return text[:end], text[end:].lstrip()


def _split_operands(text: str) -> tuple[str, str]:
    end = _closing("(" + text) - 1
    return text[: end - 1], text[end:]


def _closing(text: str) -> int:
    """Index after the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        # S(1) is VMEM, others are scalar memory and semaphores.
        yield Array(dtype, sizes, "S(" not in layout)
