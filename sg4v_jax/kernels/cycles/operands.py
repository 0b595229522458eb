"""Operands: their text in the schedule, and the memory images of what is known beforehand."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sg4v_jax.kernels.cycles.bundles import REGISTER

Getter = Callable[[], Any]
_ANNOTATION = re.compile(r"\[(?:thread|resolvable|sflag):\$\w+\]")
_PREDICATE = re.compile(r"\(\s*(!?\s*%p\w+)\s*(?:,\s*(%\w+))?\s*\)")
_NUMBER = re.compile(r"\$?(-?(?:0x[0-9a-f]+|\d+))$")
_NUMPY = {
    "s8": "i1", "u8": "u1", "pred": "u1", "s16": "<i2", "u16": "<u2", "s32": "<i4", "u32": "<u4",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Operands:
    """An instruction's operands, each a function that reads it.

    Attributes:
      predicate: whether the instruction runs; None if it always does.
      otherwise: what the result is if it doesn't; None for what the register had.
      values: in order.
      tags: those with a meaning of their own: `size`, `flag`, `hbm`, `smem`.
    """

    predicate: Getter | None
    otherwise: Getter | None
    values: list[Getter]
    tags: dict[str, Getter]


def parse(text: str, registers: Mapping[str, Any], region: Callable[[str], int]) -> Operands:
    """Reads the operands of an instruction."""
    text = _ANNOTATION.sub("", text)
    predicate = otherwise = None
    match = _PREDICATE.search(text)
    if match:
        predicate = _getter(match.group(1), registers, region)
        otherwise = _getter(match.group(2), registers, region) if match.group(2) else None
        text = text[: match.start()] + ", " + text[match.end() :]
    # A store's address is followed by its value without a comma.
    text = re.sub(r"^(\s*\[smem:.*?\]\])\s*(?=[^,\s])", r"\1, ", text)
    values: list[Getter] = []
    tags: dict[str, Getter] = {}
    for token in _split(text):
        tag, _, rest = token[1:].partition(" ") if token.startswith("@") else ("", "", token)
        getter = _getter(rest, registers, region)
        values.append(getter)
        if tag:
            tags.setdefault(tag, getter)
    return Operands(predicate, otherwise, values, tags)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    tokens, depth, token = [], 0, ""
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            tokens.append(token)
            token = ""
        else:
            token += character
    return [t.strip() for t in (*tokens, token) if t.strip()]


def _getter(token: str, registers: Mapping[str, Any], region: Callable[[str], int]) -> Getter:
    token = re.sub(r"^(\S+)\s+\[#allocation\d+\]$", r"\1", token.strip())
    if token.startswith("!"):
        inner = _getter(token[1:], registers, region)
        return lambda: None if (value := inner()) is None else not value
    if match := REGISTER.match(token):
        register = match.group(2)
        return lambda: registers[register]
    if match := _NUMBER.match(token):
        number = int(match.group(1), 0) & 0xFFFFFFFF
        return lambda: number
    if token in ("true", "false"):
        return lambda: token == "true"
    if token.startswith("#"):
        address = region(token)
        return lambda: address
    if token.startswith("["):
        parts = re.sub(r"\[smem:|[\[\]]", " ", token).split("+")
        getters = [_getter(part, registers, region) for part in parts if part.strip()]
        return lambda: None if None in (values := [get() for get in getters]) else sum(values)
    return lambda: None  # A floating-point constant.


def branch_target(text: str) -> int:
    """Bundle that a branch goes to."""
    match = re.search(r"target bundleno = (\d+)", text)
    assert match, text
    return int(match.group(1))


def call_operand(text: str) -> int:
    """Index of a call's operand."""
    match = re.search(r"index: (\d+)", text)
    assert match, text
    return int(match.group(1))


def first_register(text: str) -> str | None:
    """The first register that a text names."""
    match = REGISTER.search(text)
    return match.group(2) if match else None


def first_number(text: str) -> int:
    """The number that a text starts with, or 0."""
    match = re.match(r"\s*(\d+)", text)
    return int(match.group(1)) if match else 0


def words(data: bytes | None) -> list[int]:
    """Memory as unsigned 32-bit words."""
    if data is None:
        return []
    return [int(x) for x in np.frombuffer(data + b"\0" * (-len(data) % 4), dtype="<u4")]


def memory_image(x: np.ndarray, layout: str) -> bytes:
    """How XLA lays `x` out, given a layout such as `2,1,0:T(4,128)(4,1)`."""
    order, _, tiling = layout.partition(":")
    minor_to_major = [int(i) for i in order.split(",") if i]
    x = np.transpose(x, minor_to_major[::-1]) if minor_to_major else np.asarray(x)
    for group in re.findall(r"\(([\d,]+)\)", tiling.split("S(")[0]):
        tile = [int(i) for i in group.split(",")]
        n = len(tile)
        x = x.reshape((1,) * max(n - x.ndim, 0) + x.shape)
        lead = x.ndim - n
        x = np.pad(x, [(0, 0)] * lead + [(0, -d % t) for d, t in zip(x.shape[lead:], tile, strict=True)])
        cut = [k for d, t in zip(x.shape[lead:], tile, strict=True) for k in (d // t, t)]
        axes = [*range(lead), *range(lead, lead + 2 * n, 2), *range(lead + 1, lead + 2 * n, 2)]
        x = x.reshape(*x.shape[:lead], *cut).transpose(axes)
    return np.ascontiguousarray(x).tobytes()


_DEFINITION = re.compile(
    r"^\s*(?:ROOT )?%([\w.\-]+) = \(?(\w+)\[([\d,]*)\](?:\{([^}]*)\})?.*? ([\w\-]+)\((.*)$", re.M
)
_FORWARDED = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done")


def known_operands(hlo: str, arguments: Mapping[int, np.ndarray]) -> dict[tuple[str, int], bytes]:
    """Memory images of the integer operands whose values are constants or given arguments.

    Args:
      hlo: the optimised program, with large constants.
      arguments: values of entry parameters, by number.

    Returns:
      (program, operand) to its memory image.
    """
    definitions = {m[1]: m.groups()[1:] for m in _DEFINITION.finditer(hlo)}
    entry = hlo[max(hlo.find("\nENTRY"), 0) :]

    def value(name: str, depth: int = 0) -> np.ndarray | None:
        if name not in definitions or depth > 12 or definitions[name][0] not in _NUMPY:
            return None
        dtype, dims, _, op, rest = definitions[name]
        shape = [int(d) for d in dims.split(",") if d]
        if op == "constant":
            text = re.sub(r"/\*.*?\*/", "", rest.split("), ")[0])
            numbers = [
                {"true": 1, "false": 0}.get(t) or int(t) for t in re.findall(r"-?\d+|true|false", text)
            ]
            size = int(np.prod(shape))
            return np.array(numbers).astype(_NUMPY[dtype]).reshape(shape) if len(numbers) == size else None
        if op == "parameter" and f"%{name} = " in entry:
            found = arguments.get(int(rest.split(")")[0]))
        else:
            source = re.search(r"%([\w.\-]+)", rest)
            found = value(source.group(1), depth + 1) if source and op in (*_FORWARDED, "broadcast") else None
        if found is None:
            return None
        if op == "broadcast":
            return np.full(shape, found.reshape(-1)[0]).astype(_NUMPY[dtype]) if found.size == 1 else None
        return found.reshape(shape).astype(_NUMPY[dtype]) if found.size == int(np.prod(shape)) else None

    images = {}
    for name, (*_, op, rest) in definitions.items():
        if op not in ("custom-call", "fusion"):
            continue
        inputs = re.split(r"\), (?:custom_call_target|kind)", rest)[0]
        for index, source in enumerate(re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", inputs))):
            if (x := value(source)) is not None:
                images[name, index] = memory_image(x, definitions[source][2] or "")
    return images
