"""What XLA made of a program for one device of several: which arrays it holds, and what it sends where."""

import dataclasses
import itertools
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b(?:f32|bf16)\[([\d,]*)\]")
_CALL = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of `COLLECTIVES`.
      shapes: of its float results.
      groups: the devices, in the mesh's order, that talk to each other.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]


def float_shapes(text: str) -> set[tuple[int, ...]]:
    """All shapes of float arrays in a compiled program."""
    return {_dims(found) for found in _SHAPE.findall(text)}


def collectives(text: str, num_devices: int) -> list[Collective]:
    """All collective operations of a compiled program (`compiled.as_text()`)."""
    found = []
    for line in text.splitlines():
        if call := _CALL.search(line):
            shapes = tuple(_dims(shape) for shape in _SHAPE.findall(call[1]))
            found.append(Collective(call[2], shapes, _groups(line, num_devices)))
    return found


def gathered_activations(text: str, num_devices: int, length: int) -> list[tuple[int, ...]]:
    """What is gathered or sent around of arrays over `length`, a size that stands for nothing else."""
    moved = (
        one for one in collectives(text, num_devices) if one.kind not in ("all-reduce", "reduce-scatter")
    )
    return [shape for one in moved for shape in one.shapes if length in shape]


def whole_activations(text: str, rows: int, length: int) -> set[tuple[int, ...]]:
    """Arrays [..., n, length, ...] of more than this device's `rows`: activations that lie on several.

    `length` must stand for nothing else, and n for a multiple of `rows`.
    """
    return {
        shape
        for shape in float_shapes(text)
        for n, next_one in itertools.pairwise(shape[:-1])
        if next_one == length and n > rows and n % rows == 0
    }


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _groups(line: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Who talks to whom, in any of the ways that XLA writes it.

    `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`: numbers in order, reshaped and turned; `mesh['a'=2,'b'=2] {'b'}`:
    those along some axes of a mesh, whose devices may be such numbers.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return _listed(pairs[1])
    if listed := re.search(r"replica_groups=\{(.*?)\}\}", line):
        return _listed(listed[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[\S+?), ", line):
        return tuple(map(tuple, _turned(iota[2]).reshape(_dims(iota[1])).tolist()))
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line)
    if mesh is None:
        raise ValueError(f"no groups in {line}")
    axes = dict(re.findall(r"('\w+')=(\d+)", mesh[1]))
    ids = _turned(mesh[2] or f"[{num_devices}]").reshape([int(size) for size in axes.values()])
    along = [list(axes).index(name) for name in mesh[3].split(",")]
    kept = [i for i in range(len(axes)) if i not in along]
    members = int(np.prod([ids.shape[i] for i in along]))
    return tuple(map(tuple, ids.transpose(*kept, *along).reshape(-1, members).tolist()))


def _turned(text: str) -> np.ndarray:
    """`[2,4]T(1,0)` as an array of numbers."""
    shape, _, order = text.partition("T")
    dims = _dims(shape.strip("[]"))
    ids = np.arange(np.prod(dims)).reshape(dims)
    return ids.transpose(_dims(order.strip("()"))) if order else ids


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_dims(group) for group in re.findall(r"\{([\d,]+)", text))
