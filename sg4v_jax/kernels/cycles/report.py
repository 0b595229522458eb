"""Measures a program and says where its cycles go."""

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sg4v_jax.kernels.cycles.bundles import Program, parse, same_programs
from sg4v_jax.kernels.cycles.machine import Count, Machine
from sg4v_jax.kernels.cycles.operands import known_operands, memory_image
from sg4v_jax.kernels.cycles.target import (
    GENERATIONS,
    SAME_PROGRAMS,
    SCHEDULE,
    Compiled,
    Generation,
    compile_for,
)

_TOP, _NEVER_CALLED = "TLP", "<late-finalization>"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel or fusion, over all its calls.

    Attributes:
      name: as in the HLO.
      calls: how often it ran.
      bundles: length of its program.
      scheduled: cycles it issued.
      total: the same with waits for transfers.
      bytes: what it moved to and from HBM.
      mxu: share of the matrix units' time in use.
      vpu: share of the vector units' slots in use.
      spills: registers spilled or filled per cycle.
    """

    name: str
    calls: int
    bundles: int
    scheduled: int
    total: float
    bytes: int
    mxu: float
    vpu: float
    spills: float


@dataclasses.dataclass(frozen=True)
class Report:
    """A measured program. Cycles are of one core; cores of a chip share its work.

    Attributes:
      generation: what it was compiled for.
      scheduled: cycles issued.
      total: the same with waits for transfers.
      kernels: its parts, the longest first.
      unknown: what could not be told, e.g. branches on vector data, which count as not taken.
      seconds: time that compilation took.
    """

    generation: Generation
    scheduled: int
    total: float
    kernels: list[Kernel]
    unknown: dict[str, int]
    seconds: float

    @property
    def microseconds(self) -> float:
        """Time of all of it, waits included."""
        return self.total / self.generation.clock * 1e6

    def time_of(self, prefix: str) -> float:
        """Microseconds of the kernels whose names start with `prefix`."""
        cycles = sum(kernel.total for kernel in self.kernels if kernel.name.startswith(prefix))
        return cycles / self.generation.clock * 1e6

    def roofline(self, flops: float | int, bytes_: float | int) -> float:
        """Microseconds that the published peaks allow."""
        return max(flops / self.generation.peak, bytes_ / self.generation.bandwidth) * 1e6


def measure(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    generation: str,
    *,
    values: Mapping[int, np.ndarray] | None = None,
    operands: Mapping[tuple[str, int], np.ndarray] | None = None,
) -> Report:
    """Compiles `function` for one device of a TPU generation and counts its cycles.

    Args:
      function: what to measure; any function that `jax.jit` takes.
      arguments: arrays or ShapeDtypeStructs.
      generation: `v4`, `v5e`, `v5p` or `v6e`.
      values: values of integer arguments that steer loops, by position among the flattened arguments.
      operands: values of integer operands of kernels that steer loops but are computed on the device,
        by (start of the kernel's name, position).

    Raises:
      ValueError: on an unknown generation.
      RuntimeError: if libtpu was loaded before with another environment.
    """
    if generation not in GENERATIONS:
        raise ValueError(f"TPU generation {generation!r} is not one of {sorted(GENERATIONS)}")
    compiled = compile_for(GENERATIONS[generation], function, arguments)
    return emulate(compiled, GENERATIONS[generation], values or {}, operands or {})


def emulate(
    compiled: Compiled,
    generation: Generation,
    values: Mapping[int, np.ndarray],
    operands: Mapping[tuple[str, int], np.ndarray],
) -> Report:
    """Counts the cycles of a compiled program; see `measure`."""
    programs = {name: parse(name, texts) for name, texts in compiled.programs.items() if SCHEDULE in texts}
    for texts in compiled.programs.values():
        for name, original in same_programs(texts.get(SAME_PROGRAMS, "")).items():
            if name not in programs and original in programs:
                programs[name] = dataclasses.replace(programs[original], name=name)
    data = known_operands(compiled.hlo, values)
    for (prefix, index), value in operands.items():
        data.update(((name, index), memory_image(value, "")) for name in programs if name.startswith(prefix))
    machine = Machine(generation, programs, data)
    _release(machine, compiled.programs[_TOP][SCHEDULE])
    # Calls nest as deep as programs do, and each level takes a few frames.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10_000))
    machine.run(programs[_TOP])
    kernels = [
        _kernel(generation, programs[name], count)
        for name, count in machine.counts.items()
        if name in programs
    ]
    never = set(programs) - set(machine.counts) - {_NEVER_CALLED}
    unknown = {**machine.unknown, **{f"{name} never ran": 1 for name in never}}
    kernels.sort(key=lambda kernel: -kernel.total)
    return Report(generation, machine.issued, machine.clock, kernels, unknown, compiled.seconds)


def _release(machine: Machine, text: str) -> None:
    """The top program runs its body only if the runtime has written 1 into a word: writes it."""
    for register, allocation in re.findall(r"(%s\d+_s\d+) = sld \[smem:\[(#allocation\d+)\]\]", text):
        test = re.search(r"(%p\d+_p\d+) = scmp\.ne\.s32\.totalorder " + re.escape(register) + r", 1\b", text)
        if test and re.search(r"sbr\.rel \(" + re.escape(test.group(1)) + r"\)", text):
            machine.memory[machine.region(_TOP, allocation)] = 1


def _kernel(generation: Generation, program: Program, count: Count) -> Kernel:
    size = len(program.bundles)
    change = np.zeros(size + 1)
    for (start, end), runs in count.runs.items():
        change[start] += runs
        change[end] -= runs
    times = np.cumsum(change)[:size]
    issued = max(int(times.sum()), 1)
    busy = float(times @ np.array(program.matmuls)) * generation.matmul_cycles / generation.mxus
    used = dict.fromkeys(("VALU", "VLOAD:FILL", "VSTORE:SPILL"), 0.0)
    if program.use:
        sums = times @ np.array(program.use)
        used |= dict(zip(program.slots, sums.tolist(), strict=True))
    return Kernel(
        name=program.name,
        calls=count.calls,
        bundles=size,
        scheduled=count.issued,
        total=count.time,
        bytes=count.bytes,
        mxu=busy / issued,
        vpu=used["VALU"] / issued / program.slots.get("VALU", 4),
        spills=(used["VLOAD:FILL"] + used["VSTORE:SPILL"]) / issued,
    )
