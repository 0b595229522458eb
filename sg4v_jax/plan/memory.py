"""Memory of a chip: what a compiled program takes, and what the compiler says when it doesn't fit."""

import dataclasses
import math
import re
from typing import Any

from sg4v_jax.plan.topology import GIB

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip, as the compiler assigned them.

    Attributes:
      arguments: what the program gets: weights, optimizer state, batch.
      outputs: what it gives.
      aliased: outputs that lie where arguments lay (donated).
      temporaries: everything in between.
      program: the code.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int

    @classmethod
    def of(cls, executable: Any) -> "Memory":
        stats = executable.memory_analysis()
        return cls(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            program=stats.generated_code_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Allocation:
    """One of the largest allocations of a program that doesn't fit.

    Attributes:
      bytes: with padding.
      shape: as HLO writes it.
      where: the JAX operation it comes from.
    """

    bytes: int
    shape: str
    where: str


class OutOfMemory(RuntimeError):
    """The compiler ran out of the chip's memory.

    Attributes:
      used: bytes that the program takes; 0 if the compiler didn't say.
      limit: bytes that there are; 0 if it didn't say.
      largest: the largest allocations, the largest first.
    """

    def __init__(self, used: int, limit: int, largest: list[Allocation]):
        super().__init__(f"needs {used / GIB:.2f} GiB of {limit / GIB:.2f} GiB")
        self.used, self.limit, self.largest = used, limit, largest


def out_of_memory(message: str) -> OutOfMemory | None:
    """Reads the compiler's message; None if it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    used = limit = 0
    for form in (r"Used (\S+) of (\S+) hbm", r"\((\S+)\) exceeds available HBM \((\S+)\)"):
        if found := re.search(form, message):
            used, limit = _bytes(found[1]), _bytes(found[2])
    return OutOfMemory(used, limit, list(_allocations(message)))


def _allocations(message: str) -> list[Allocation]:
    found = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        shape = re.search(r"Shape: (\S+)", part)
        where = re.search(r'op_name="([^"]*)"', part)
        size = re.match(r"([\d.]+\w?)", part)
        if size:
            found.append(
                Allocation(_bytes(size[1]), shape[1] if shape else "", where[1] if where else "an argument")
            )
    return sorted(found, key=lambda allocation: -allocation.bytes)


def largest_tensors(stablehlo: str, rows: int, parts: int, count: int = 8) -> list[Allocation]:
    """The largest results of a program before it is compiled, for when the compiler names none.

    Args:
      stablehlo: the lowered program, with the shapes of all devices together.
      rows: of the batch.
      parts: that the batch is cut into. A shape that has `rows`, or a multiple, among its sizes is taken
        to be cut like the batch; all others count whole.
      count: how many.
    """
    found = {}
    for text, dtype in set(re.findall(r"-> \(?tensor<((?:\d+x)+)([a-z]+\d+)>", stablehlo)):
        sizes = [int(size) for size in text.split("x") if size]
        bits = int(re.sub(r"\D", "", dtype))
        cut = parts if any(size % rows == 0 for size in sizes) else 1
        found[f"{dtype}[{','.join(map(str, sizes))}]"] = math.prod(sizes) * bits // 8 // cut
    biggest = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [Allocation(size, shape, "(on one chip; the shape is of all)") for shape, size in biggest]


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([\d.]+?)\.?([BKMGT]?)", text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0
