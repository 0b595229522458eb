"""Products and memory traffic of a compiled program, with the trip counts of its loops."""

import collections
import dataclasses
import math
import re

import numpy as np

from sg4v_jax.plan.hlo import COLLECTIVES, Array, Instruction, Module

# Instructions that move nothing: they name, or only wait for what was counted at its start.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "copy-done", "slice-done", "async-done", "after-all", "partition-id", "opt-barrier",
    "optimization-barrier", "collective-permute-done", "all-gather-done", "all-reduce-done",
    "send-done", "recv-done", "call-start", "custom-call-start",
    "custom-call-update",
}  # fmt: skip
_MARKERS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does in one run of the program.

    Attributes:
      product_flops: operations of matrix products outside kernels.
      hbm_bytes: read from and written to memory.
      kernels: how often each Pallas kernel runs, by its name.
    """

    product_flops: float
    hbm_bytes: float
    kernels: dict[str, int]

    def plus(self, other: "Work", times: int) -> "Work":
        """This and another so many times."""
        kernels = collections.Counter(self.kernels)
        kernels.update({name: times * count for name, count in other.kernels.items()})
        flops, moved = times * other.product_flops, times * other.hbm_bytes
        return Work(self.product_flops + flops, self.hbm_bytes + moved, dict(kernels))


def work(module: Module) -> Work:
    """Counts the work of a program."""
    flops = sum(
        runs * _product_flops(module, name)
        for name, runs in module.runs().items()
        if name in module.computations
    )
    bytes_ = 0.0
    kernels: dict[str, int] = {}
    for computation, runs, line in module.scheduled():
        bytes_ += runs * _traffic(module, computation, line)
        if name := _kernel(line):
            kernels[name] = kernels.get(name, 0) + runs
    return Work(float(flops), bytes_, kernels)


def computing(module: Module, line: Instruction) -> Work:
    """Products and kernels of one instruction and all that it calls; their traffic is not counted."""
    done = Work(0.0, 0.0, {name: 1} if (name := _kernel(line)) else {})
    trips = module.trips(line) or 1
    for called in line.called():
        if lines := module.computations.get(called):
            done = done.plus(Work(_product_flops(module, called), 0.0, {}), trips)
            for inner in lines:
                done = done.plus(computing(module, inner), trips)
    return done


def _kernel(line: Instruction) -> str:
    """The name of a Pallas kernel; empty for anything else."""
    ours = 'custom_call_target="tpu_custom_call"' in line.attributes
    return re.sub(r"[.\d]+$", "", line.name) if ours else ""


def _product_flops(module: Module, computation: str) -> int:
    lines = module.computations[computation]
    shapes = {line.name: line.result for line in lines}
    total = 0
    for line in lines:
        if (
            line.opcode in ("convolution", "dot")
            and line.result
            and all(n in shapes for n in line.operands[:2])
        ):
            left, right = (shapes[name][0] for name in line.operands[:2])
            count = _convolution if line.opcode == "convolution" else _dot
            total += count(line, left, right)
    return total


def _dot(line: Instruction, left: Array, right: Array) -> int:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
    contracted = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return 2 * math.prod(line.result[0].dims) * math.prod(left.dims[axis] for axis in contracted)


def _convolution(line: Instruction, left: Array, right: Array) -> int:
    """The TPU compiler writes every product as a convolution; batch axes are windows with dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if not labels:
        return 0
    lhs, rhs, out = labels.groups()
    size = 2 * line.result[0].dims[out.index("b")] * line.result[0].dims[out.index("f")]
    size *= right.dims[rhs.index("i")]
    window = dict(re.findall(r"(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_\-]+)", line.attributes))
    axes = sorted(char for char in lhs if char.isdigit())
    for position, axis in enumerate(axes):
        options = {key: value.split("x")[position] for key, value in window.items()}
        size *= _valid_pairs(
            output=line.result[0].dims[out.index(axis)],
            kernel=right.dims[rhs.index(axis)],
            length=left.dims[lhs.index(axis)],
            stride=int(options.get("stride", 1)),
            low=int(options.get("pad", "0_0").split("_")[0]),
            dilate_left=int(options.get("lhs_dilate", 1)),
            dilate_right=int(options.get("rhs_dilate", 1)),
        )
    return size


def _valid_pairs(
    *, output: int, kernel: int, length: int, stride: int, low: int, dilate_left: int, dilate_right: int
) -> int:
    """Pairs of output and kernel positions that meet an input, and not padding."""
    outputs, kernels = np.arange(output)[:, None], np.arange(kernel)[None]
    index = outputs * stride - low + kernels * dilate_right
    return int(((index % dilate_left == 0) & (index >= 0) & (index < length * dilate_left)).sum())


def _traffic(module: Module, computation: str, line: Instruction) -> float:
    """Bytes that one run of an instruction moves between chip and memory."""
    if line.opcode == "custom-call" and line.name.startswith("decode"):
        return 0  # It gets the caches of all layers and reads those of one: counted with the kernel's time.
    if line.opcode in _FREE or any(marker in line.attributes for marker in _MARKERS):
        return 0
    if line.opcode.removesuffix("-start") in COLLECTIVES or line.opcode in ("call-done", "custom-call-done"):
        return 2 * _in_hbm(line.result)
    shapes = _shapes(module, computation)
    operands = [shapes.get(name, ()) for name in line.operands]
    if line.opcode == "fusion":
        inner = module.computations.get(line.called()[0], [])
        read = sum(_read(module, line, i, _in_hbm(arrays)) for i, arrays in enumerate(operands))
        return read + _written(inner, line)
    if line.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if line.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
        moved = [array for array in line.result if array.dims]
        return 2 * min((array.bytes for array in moved), default=0)
    if line.opcode in ("send", "recv"):
        return _in_hbm(line.result[:1])
    if line.opcode == "copy-start":
        # The result names destination and source; each counts where it is in memory.
        return _in_hbm(line.result[:2])
    return _in_hbm(line.result) + sum(map(_in_hbm, operands))


def _shapes(module: Module, computation: str) -> dict[str, tuple[Array, ...]]:
    return {line.name: line.result for line in module.computations[computation]}


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _read(module: Module, fusion: Instruction, index: int, whole: int) -> int:
    """Bytes that a fusion reads of one operand: of a stack of layers only the layer that it takes."""
    inner = module.computations.get(fusion.called()[0], [])
    name = next((line.name for line in inner if line.opcode == "parameter" and _number(line) == index), None)
    if not whole or name is None:
        return whole
    names, read = [name], 0
    while names:
        name = names.pop()
        for user in inner:
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "dynamic-slice":
                read += user.bytes
            elif user.opcode == "fusion":
                read += _read(module, user, user.operands.index(name), whole)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # Only what is new is written.
            elif user.opcode != "tuple" and user.opcode not in COLLECTIVES:
                return whole  # A tuple passes it on, to the next step of an asynchronous collective.
    return min(read, whole)


def _number(line: Instruction) -> int:
    found = re.match(r"(\d+)\)", line.attributes)
    return int(found[1]) if found else -1


def _written(inner: list[Instruction], line: Instruction) -> float:
    """Bytes that a fusion writes: of a stack that it updates only what is new."""
    by_name = {other.name: other for other in inner}
    root = next((other for other in inner if other.root), None)
    if root is None:
        return _in_hbm(line.result)
    parts = [by_name.get(name, root) for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for part, array in zip(parts, line.result, strict=False):
        while part.opcode == "bitcast" and part.operands[0] in by_name:
            part = by_name[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            update = by_name.get(part.operands[1])
            total += update.bytes if update and array.in_hbm else 0
        elif part.opcode not in ("parameter", *COLLECTIVES):
            total += array.bytes if array.in_hbm else 0
    return total
