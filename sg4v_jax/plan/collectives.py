"""The collectives of a compiled program: kinds, bytes, who takes part, and whether they hide behind work."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from sg4v_jax.plan.hlo import COLLECTIVES, Instruction, Module
from sg4v_jax.plan.work import Work, computing


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: of `COLLECTIVES`.
      runs: how often it runs in one step.
      bytes: its whole arrays in one run: what is gathered, reduced or scattered.
      members: positions in the mesh, inside a slice, of the first group of devices that take part.
      hidden: whether the compiler runs it beside other work.
      beside: of one on a SparseCore, what the TensorCore computes from its start to its end in all runs: it
        hides as long as that takes. None: of the others the schedule doesn't tell.
      where: the JAX operation it comes from.
      pairs: of a permute, all (source, target).
      between_slices: whether each chip does it with those in its place in the other slices, by hosts and
        their network; only `sent_in` makes sense of it then.
    """

    kind: str
    runs: int
    bytes: int
    members: tuple[int, ...]
    hidden: bool
    where: str
    pairs: tuple[tuple[int, int], ...] = ()
    between_slices: bool = False
    beside: Work | None = None

    @property
    def sent(self) -> float:
        """Bytes that each chip sends in a step, by the ring algorithm."""
        if self.pairs:
            return self.runs * self.bytes
        return self.sent_in(len(self.members))

    def sent_in(self, size: int) -> float:
        """The same in a ring of so many, each of which has all of the bytes."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.runs * self.bytes * (size - 1) / size


def collectives(module: Module) -> list[Collective]:
    """All collectives of a program, in the order of its text."""
    found: dict[tuple[str, str], Collective] = {}
    beside = _beside(module)
    for computation, runs, line in module.scheduled():
        done = beside.get(line.name)
        for inner, hidden in _inside(module, line):
            hidden = hidden and (done is None or done.product_flops > 0 or bool(done.kernels))
            # Start, steps and end of an asynchronous collective each name it: they are one.
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            key = computation, channel[1] if channel else inner.name
            if inner.bytes and key not in found:
                made = _collective(inner, runs, hidden, scattered=line is not inner and _scatters(line))
                found[key] = dataclasses.replace(made, beside=done)
            elif hidden and key in found:
                found[key] = dataclasses.replace(found[key], hidden=True)
    return list(found.values())


def _inside(module: Module, line: Instruction) -> Iterator[tuple[Instruction, bool]]:
    """The collectives that one instruction runs, and whether it hides them."""
    kind = line.opcode.removesuffix("-start")
    if kind in COLLECTIVES or _megascale(line):
        yield line, line.opcode.endswith("-start")
    elif line.opcode in ("fusion", "custom-call", "custom-call-start", "call-start", "async-start"):
        named = (line.name, *line.called())
        hidden = line.opcode.endswith("-start") or any(re.match("async.collective", name) for name in named)
        for called in line.called():
            for inner in module.computations.get(called, ()):
                for collective, _ in _inside(module, inner):
                    yield collective, hidden


def _beside(module: Module) -> dict[str, Work]:
    """What is computed beside each call of a SparseCore in all runs, by the name of its start.

    From libtpu 0.0.52 on a call starts in two parts: the first has no operands, so what lies between them
    hides nothing.
    """
    beside: dict[str, Work] = {}
    running: dict[str, str] = {}  # The start of each call, by its newest part.
    for _, runs, line in module.scheduled():
        if line.opcode in ("call-start", "custom-call-start"):
            running[line.name] = line.name
            beside[line.name] = Work(0.0, 0.0, {})
        elif line.opcode == "custom-call-update" and line.operands[0] in running:
            running[line.name] = start = running.pop(line.operands[0])
            beside[start] = Work(0.0, 0.0, {})
        elif line.opcode in ("call-done", "custom-call-done"):
            running.pop(line.operands[0], None)
        elif running:
            done = computing(module, line)
            for start in running.values():
                beside[start] = beside[start].plus(done, runs)
    return beside


def _megascale(line: Instruction) -> str:
    """The kind of a collective between slices: the compiler writes it as a transfer to the host and back."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
    return found[1].lower().replace("_", "-") if found and line.opcode == "send" else ""


def _scatters(line: Instruction) -> bool:
    """Whether a fusion keeps only this chip's part of an all-reduce."""
    return any(name.startswith("all-reduce-scatter") for name in line.called())


def _collective(line: Instruction, runs: int, hidden: bool, scattered: bool) -> Collective:
    kind = line.opcode.removesuffix("-start")
    sizes = [array.bytes for array in line.result]
    # The result of a start holds the operands beside what comes of them.
    total = max(sizes, default=0) if line.opcode.endswith("-start") else sum(sizes)
    members = _members(line.attributes)
    if kind == "reduce-scatter":
        total *= len(members)
    where = re.search(r'op_name="([^"]*)"', line.attributes)
    if between := _megascale(line):
        return Collective(between, runs, sizes[0], (0,), True, where[1] if where else "", between_slices=True)
    kind = "reduce-scatter" if scattered else kind
    pairs = _pairs(line.attributes)
    return Collective(kind, runs, total, members, hidden, where[1] if where else "", pairs)


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Sources and targets of a permute."""
    found = re.search(r"source_target_pairs=(\{[\d,{} ]*\})", text)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
    return tuple((int(source), int(target)) for source, target in pairs)


def _members(text: str) -> tuple[int, ...]:
    """The first group, from any of the forms in which XLA writes groups."""
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(found[1]), int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, found[1].split(",")))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        axes = re.findall(r"'([^']*)'=(\d+)", found[1])
        used = re.findall(r"'([^']*)'", found[2])
        return _along([int(size) for _, size in axes], [name in used for name, _ in axes])
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = list(map(int, found[3].split(",")))
        order = list(map(int, found[4].split(","))) if found[4] else list(range(len(sizes)))
        return tuple(itertools.islice(_transposed(sizes, order), int(found[2])))
    return (0,)


def _along(sizes: list[int], used: list[bool]) -> tuple[int, ...]:
    """Row-major indices of those that differ from the first only in the used axes."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    ranges = [range(size if use else 1) for size, use in zip(sizes, used, strict=True)]
    return tuple(
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*ranges)
    )


def _transposed(sizes: list[int], order: list[int]) -> Iterator[int]:
    """0, 1, 2, ... as an array of `sizes`, its axes in another order, row by row."""
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    for index in itertools.product(*(range(sizes[axis]) for axis in order)):
        yield sum(i * strides[axis] for i, axis in zip(index, order, strict=True))
