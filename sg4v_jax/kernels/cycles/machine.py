"""Runs the scalar part of a schedule: registers, scalar memory, branches, transfers and waits."""

import collections
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from sg4v_jax.kernels.cycles import operands
from sg4v_jax.kernels.cycles.bundles import Instruction, Program
from sg4v_jax.kernels.cycles.target import Generation

WORD = 0xFFFFFFFF
LATENCY = 0.45e-6
"""Seconds from a transfer's start to its first byte. Fitted to a published matmul timing on v5e."""
_RUNTIME = 1 << 30
"""Where the runtime's words lie in scalar memory, above all allocations: programs count in some of them."""
# How a call gets its operands, and a register another's value, without computing anything.
_RENAMES = ("sphi", "int_to_ptr")


def _signed(x: int) -> int:
    return ((x & WORD) ^ 0x80000000) - 0x80000000


def _lifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """None is a value that scalar instructions alone don't tell; what follows from it isn't known either."""
    return lambda *values: None if None in values else function(*values)


def _known_or(a: bool | None, b: bool | None) -> bool | None:
    return True if a or b else None if None in (a, b) else False


def _known_and(a: bool | None, b: bool | None) -> bool | None:
    return False if a is False or b is False else None if None in (a, b) else True


def _not(a: bool | None) -> bool | None:
    return None if a is None else not a


def _select(condition: bool | None, a: Any, b: Any) -> Any:
    return None if condition is None else a if condition else b


_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "smov": lambda a: a,
    "sadd": _lifted(lambda *xs: sum(xs) & WORD),
    "scalar_lea": _lifted(lambda *xs: sum(xs) & WORD),
    "ssub": _lifted(lambda a, b: (a - b) & WORD),
    "smul": _lifted(lambda a, b: (a * b) & WORD),
    "smulhi": _lifted(lambda a, b: (a * b) >> 32),
    "sshll": _lifted(lambda a, b: (a << (b & 31)) & WORD),
    "sshrl": _lifted(lambda a, b: a >> (b & 31)),
    "sshra": _lifted(lambda a, b: (_signed(a) >> (b & 31)) & WORD),
    "sand": _lifted(operator.and_),
    "sor": _lifted(operator.or_),
    "sxor": _lifted(operator.xor),
    "sc": _lifted(lambda a, b: a + b > WORD),
    "scalar_select": _select,
    "pmov": lambda a: a,
    "pneg": _not,
    "por": _known_or,
    "pand": _known_and,
    "pnand": lambda a, b: _not(_known_and(a, b)),
    "pnor": lambda a, b: _not(_known_or(a, b)),
    "pxor": _lifted(operator.ne),
}


@dataclasses.dataclass
class Count:
    """What one program did, over all its runs."""

    calls: int = 0
    issued: int = 0
    time: float = 0.0
    bytes: int = 0
    runs: collections.Counter[tuple[int, int]] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class _Step:
    """Bundles up to and with one that does something: its effects, then its writes, all at once."""

    bundles: int
    effects: list[Callable[[], None]]
    writes: list[tuple[str, Callable[[], Any]]]
    late: list[tuple[str, Callable[[], Any]]]


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Straight-line code up to a branch, with its delay slots."""

    steps: list[_Step]
    end: int
    target: int | None
    taken: Callable[[], Any] | None


class Machine:
    """Executes the programs of one executable.

    Attributes:
      issued: cycles issued so far.
      clock: the same with waits.
      counts: what each program did.
      unknown: what could not be told, and how often: branches on vector data, missing programs.
    """

    def __init__(
        self,
        generation: Generation,
        programs: Mapping[str, Program],
        data: Mapping[tuple[str, int], bytes],
    ):
        self.generation, self.programs, self.data = generation, programs, data
        self.registers: dict[str, Any] = collections.defaultdict(int)
        self.memory: dict[int, int | None] = {}
        self.issued, self.clock = 0, 0.0
        self.counts: dict[str, Count] = collections.defaultdict(Count)
        self.unknown: collections.Counter[str] = collections.Counter()
        self._regions: dict[tuple[str, str], int] = {}
        self._stretches: dict[tuple[str, int], _Stretch] = {}
        self._flags: dict[int, list[Any]] = {}
        self._pipe_free = 0.0
        self._rate = generation.bandwidth / generation.cores / generation.clock
        self._latency = LATENCY * generation.clock
        self._children: list[list[float]] = []
        self._taken: Any = None

    def run(self, program: Program) -> None:
        """Runs a program from its first bundle to its last."""
        count = self.counts[program.name]
        count.calls += 1
        issued, clock = self.issued, self.clock
        self._children.append([0, 0.0])
        pc = 0
        while pc < len(program.bundles):
            stretch = self._stretches.get((program.name, pc))
            if stretch is None:
                stretch = self._stretches[program.name, pc] = _Decoder(self, program).stretch(pc)
            count.runs[pc, stretch.end] += 1
            pc = self._execute(stretch, program.name)
        children = self._children.pop()
        count.issued += self.issued - issued - int(children[0])
        count.time += self.clock - clock - children[1]
        if self._children:
            self._children[-1][0] += self.issued - issued
            self._children[-1][1] += self.clock - clock

    def _execute(self, stretch: _Stretch, name: str) -> int:
        registers, taken = self.registers, None
        for step in stretch.steps:
            self.issued += step.bundles
            self.clock += step.bundles
            if step.effects:
                # Transfers and calls start with their bundle, not after it.
                self.clock -= 1
                for effect in step.effects:
                    effect()
                self.clock += 1
                if self._taken is not None:
                    taken, self._taken = self._taken, None
            values = [(register, get()) for register, get in step.writes]
            for register, value in values:
                registers[register] = value
            for register, get in step.late:
                registers[register] = get()
        if stretch.target is None:
            return stretch.end
        condition = taken[0] if taken is not None else True
        if condition is None:
            self.unknown[f"branch in {name}"] += 1
        return stretch.target if condition else stretch.end

    def region(self, program: str, name: str) -> int:
        """Address of an allocation."""
        place = (len(self._regions) + 1) << 15
        assert place < _RUNTIME
        return self._regions.setdefault((program, name), place)

    def operand(self, program: str, index: int, space: str) -> int | None:
        """Value of a call's operand: a pointer, or a scalar itself."""
        words = operands.words(self.data.get((program, index)))
        if space == "smem":
            base = self.region(program, f"operand {index}")
            self.memory.update((base + i, word) for i, word in enumerate(words))
            if not words:
                self.memory[base] = None
            return base
        if space in ("hbm", "vmem", "cmem"):
            return (0x100 + index) << 16
        return words[0] if words else None

    def call(self, name: str) -> None:
        """Runs another program, as part of the one that runs."""
        if name in self.programs:
            self.run(self.programs[name])
        else:
            self.unknown[f"missing program {name}"] += 1

    def transfer(self, program: str, op: str, size: Any, flag: Any, source: Any, target: Any) -> None:
        """Starts a transfer of `size` granules that adds to `flag` when it is done."""
        if "remote" in op:  # The other core's flag: both cores are as fast.
            return
        if size is None or flag is None:
            self.unknown["size or flag of a transfer"] += 1
            return
        if "host" in op:
            return
        count, bytes_ = self.counts[program], size * self.generation.granule
        if "smem" in op and target is not None:
            self._load_words(program, source, target, bytes_ // 4)
        if "hbm" in op or "general" in op:
            count.bytes += bytes_
            self._pipe_free = max(self.clock, self._pipe_free) + bytes_ / self._rate
            done = self._pipe_free + self._latency
        else:
            done = self.clock + self._latency / 8 + bytes_ / (4 * self._rate)
        self._flags.setdefault(flag, [0, []])[1].append((done, size))

    def _load_words(self, program: str, source: Any, target: int, size: int) -> None:
        known: list[int] | None = None
        if source is not None:
            for pointer in (source >> 4, source):
                data = self.data.get((program, (pointer >> 16) - 0x100))
                known = known or (operands.words(data) if data is not None else None)
        for i in range(min(size, 1 << 15)):
            self.memory[(target + i) & WORD] = None if known is None else known[i] if i < len(known) else 0

    def wait(self, flag: Any, need: Any) -> None:
        """Waits until enough has arrived."""
        if flag is None or need is None:
            self.unknown["wait"] += 1
            return
        if flag not in self._flags:
            return
        state, need = self._flags[flag], _signed(need)
        state[1].sort()
        while state[1] and (state[0] < need or state[1][0][0] <= self.clock):
            done, size = state[1].pop(0)
            state[0] += size
            self.clock = max(self.clock, done)

    def add_to_flag(self, flag: Any, amount: Any) -> None:
        """Adds to a flag; programs take off what they waited for."""
        if flag is not None and amount is not None:
            self._flags.setdefault(flag, [0, []])[0] += _signed(amount)

    def branch(self, condition: Any) -> None:
        """Remembers what a branch decided, for after its delay slots."""
        self._taken = (condition,)


class _Decoder:
    """Turns bundles into steps."""

    def __init__(self, machine: Machine, program: Program):
        self.machine, self.program = machine, program

    def stretch(self, start: int) -> _Stretch:
        """Decodes from `start` to the end of the next branch's delay slots."""
        steps: list[_Step] = []
        pc, passed = start, 0
        target, condition, left = None, None, None
        while pc < len(self.program.bundles):
            effects: list[Callable[[], None]] = []
            writes: list[tuple[str, Callable[[], Any]]] = []
            late: list[tuple[str, Callable[[], Any]]] = []
            for instruction in self.program.bundles[pc]:
                if instruction.name == "sbr.rel":
                    target = operands.branch_target(instruction.operands)
                    condition = self._parse(instruction.operands.split("target")[0]).predicate
                    left = self.machine.generation.delay_slots + 1
                    if condition is not None:
                        effects.append(self._branch(condition))
                elif instruction.register is None:
                    effects.append(self._effect(instruction))
                elif instruction.name.startswith(_RENAMES):
                    late += self._rename(instruction)
                else:
                    writes.append((instruction.register, self._value(instruction)))
            pc, passed = pc + 1, passed + 1
            if effects or writes or late:
                steps.append(_Step(passed, effects, writes, late))
                passed = 0
            if left is not None:
                left -= 1
                if left == 0:
                    break
        if passed:
            steps.append(_Step(passed, [], [], []))
        return _Stretch(steps, pc, target, condition)

    def _branch(self, condition: Callable[[], Any]) -> Callable[[], None]:
        return lambda: self.machine.branch(condition())

    def _parse(self, text: str) -> operands.Operands:
        return operands.parse(
            text, self.machine.registers, lambda name: self.machine.region(self.program.name, name)
        )

    def _rename(self, instruction: Instruction) -> list[tuple[str, Callable[[], Any]]]:
        # Phis and casts mostly name a register that already has the value.
        source = operands.first_register(instruction.operands)
        if instruction.name == "sphi" or source in (None, instruction.register):
            return []
        assert instruction.register is not None
        return [(instruction.register, lambda: self.machine.registers[source])]

    def _effect(self, instruction: Instruction) -> Callable[[], None]:
        machine, name, op = self.machine, self.program.name, instruction.name
        if op == "inlined_call":
            return lambda: machine.call(instruction.operands)
        parsed = self._parse(instruction.operands)
        values, tags = parsed.values, parsed.tags
        if op == "sst":
            address, value = values

            def effect() -> None:
                place = address()
                if place is not None:
                    machine.memory[place & WORD] = value()
        elif op == "dma.done.wait":

            def effect() -> None:
                machine.wait(values[0](), values[1]())
        elif op == "vsyncadd":

            def effect() -> None:
                machine.add_to_flag(values[0](), values[1]())
        else:

            def effect() -> None:
                read = {tag: get() for tag, get in tags.items()}
                source = read.get("hbm", values[0]())
                machine.transfer(name, op, read.get("size"), read.get("flag"), source, read.get("smem"))

        predicate = parsed.predicate
        if predicate is None:
            return effect
        return lambda: effect() if predicate() else None

    def _value(self, instruction: Instruction) -> Callable[[], Any]:
        machine, name, op = self.machine, self.program.name, instruction.name
        kind = op.split(".")[0]
        if kind == "inlined_call_operand":
            index, space = operands.call_operand(instruction.operands), op.partition(".")[2]
            return lambda: machine.operand(name, index, space)
        if kind in ("scalar_parameter_address", "reloc"):  # Words of the runtime: zero, e.g. tracing is off.
            number = operands.first_number(instruction.operands)
            return lambda: _RUNTIME + (number << 8)
        parsed = self._parse(instruction.operands)
        values = parsed.values
        if kind == "sld":
            read: Callable[..., Any] = lambda a: None if a is None else machine.memory.get(a & WORD, 0)  # noqa: E731
        elif kind == "scmp":
            _, comparison, dtype, *_ = op.split(".")
            view = _signed if dtype == "s32" else int
            compare = _COMPARE[comparison]
            read = _lifted(lambda a, b: compare(view(a), view(b)))
            if dtype not in ("s32", "u32"):
                read = lambda *_: None  # noqa: E731
        elif kind in _ARITHMETIC:
            read = _ARITHMETIC[kind]
        else:  # From the vector unit, or floating point: data, not control.
            read = lambda *_: None  # noqa: E731
        predicate, register = parsed.predicate, instruction.register or ""
        if predicate is None:
            return lambda: read(*[get() for get in values])
        old = parsed.otherwise or (lambda: machine.registers[register])

        def value() -> Any:
            decided = predicate()
            return None if decided is None else read(*[get() for get in values]) if decided else old()

        return value
