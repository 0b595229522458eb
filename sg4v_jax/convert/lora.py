"""LoRA directories of PEFT, as LLaVA's and share4v's training leave them, merged with their base.

A directory holds the adapter (adapter_config.json, adapter_model.*), what else was trained
(non_lora_trainables.bin: the projector) and the model's config.json (spec 4.5).
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sg4v_jax.convert import configs
from sg4v_jax.convert.checkpoint import PARTS, Checkpoint
from sg4v_jax.convert.files import open_file, read_json
from sg4v_jax.convert.names import canonical_name
from sg4v_jax.convert.params import by_canonical_name, without_added_rows
from sg4v_jax.convert.tensors import ConversionError, Tensor

ADAPTER = "adapter_config.json"
_TRAINABLES = "non_lora_trainables.bin"
# The wrappers of PEFT, and LLaVA's model inside them.
_WRAPPERS = re.compile(r"^base_model\.model\.|^model\.(?=model\.)")
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight$")
# Kinds of LoRA that add something else than a product of two matrices.
_FIXED = {
    "peft_type": "LORA",
    "fan_in_fan_out": False,
    "use_dora": False,
    "alpha_pattern": {},
    "rank_pattern": {},
    "bias": "none",
}
# Ways to start that leave the base as it was; the others (PiSSA, OLoRA, ...) subtract from it.
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")


def merge_lora(directory: pathlib.Path, base: Checkpoint) -> Checkpoint:
    """A base checkpoint with an adapter merged: W + alpha / r * B A, in float32, rounded once.

    Args:
      directory: the adapter's.
      base: what it was trained on top of; not read yet, nor is the adapter.

    Raises:
      ConversionError: files are missing or damaged, or the adapter doesn't fit the base. Lists
        everything that is wrong.
    """
    settings = read_json(directory / ADAPTER)
    problems = [f"{ADAPTER}: {problem}" for problem in configs.unsupported(settings, _FIXED)]
    if (initial := settings.get("init_lora_weights", True)) not in _INITIAL:
        supported = ", ".join(map(repr, _INITIAL))
        problems.append(f"{ADAPTER}: init_lora_weights is {initial!r}; supported: {supported}")
    tensors = _unwrapped(_adapter_file(directory))
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _FACTOR.match(name)
        if found:
            factors.setdefault(f"{found['module']}.weight", {})[found["factor"]] = tensor
        else:
            replaced[name.replace(".modules_to_save.default.", ".")] = tensor
    if (directory / _TRAINABLES).is_file():
        replaced |= _unwrapped(directory / _TRAINABLES)
    whole = by_canonical_name(replaced)
    if base.text is not None:
        whole = without_added_rows(whole, base.text.vocab_size)
    problems += _misplaced(whole, base)
    merged = {**base.tensors, **whole}
    for name, pair in factors.items():
        key = canonical_name(name) or name
        problem = _misfit(name, pair, merged.get(key))
        if problem:
            problems.append(problem)
        else:
            merged[key] = _merged(merged[key], pair["A"], pair["B"], _scale(settings, pair["A"]))
    if problems:
        raise ConversionError([f"{directory} can't be merged with {base.path}:", *problems])
    history = {**base.usage.history, "lora": str(settings.get("base_model_name_or_path"))}
    usage = dataclasses.replace(base.usage, history=history)
    return dataclasses.replace(base, path=directory, layout="lora", tensors=merged, usage=usage)


def base_of(directory: pathlib.Path) -> pathlib.Path:
    """The directory that an adapter names as its base, or one of that name beside it.

    Raises:
      ConversionError: there is neither.
    """
    name = read_json(directory / ADAPTER).get("base_model_name_or_path") or ""
    candidates = [pathlib.Path(name), directory.parent / pathlib.Path(name).name]
    for candidate in candidates:
        if name and candidate.is_dir():
            return candidate
    raise ConversionError([f"{directory} is a LoRA on top of {name!r}: fetch that, and give it as --base"])


def _adapter_file(directory: pathlib.Path) -> pathlib.Path:
    names = ("adapter_model.safetensors", "adapter_model.bin")
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise ConversionError([f"{directory} has neither {' nor '.join(names)}"])


def _unwrapped(path: pathlib.Path) -> dict[str, Tensor]:
    return {_WRAPPERS.sub("", name): tensor for name, tensor in open_file(path).items()}


def _misplaced(tensors: Mapping[str, Tensor], base: Checkpoint) -> Iterator[str]:
    """What is wrong with tensors that take the place of the base's. It need not have a projector."""
    for key, tensor in tensors.items():
        found = base.tensors.get(key)
        if found is None and not key.startswith(PARTS["projector"]):
            yield f"{tensor.name} in {tensor.where}: the base has no such weight"
        elif found is not None and found.shape != tensor.shape:
            yield f"{tensor.name} in {tensor.where}: expected shape {found.shape}, found {tensor.shape}"


def _misfit(name: str, pair: Mapping[str, Tensor], weight: Tensor | None) -> str | None:
    if pair.keys() != {"A", "B"}:
        return f"{name}: lora_{next(iter(pair))} without its counterpart"
    if weight is None:
        return f"{name}: the base has no such weight"
    a, b = pair["A"].shape, pair["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != weight.shape:
        return f"{name}: expected [{weight.shape[0]}, r] times [r, {weight.shape[1]}], found {b} times {a}"
    return None


def _scale(settings: Mapping[str, Any], a: Tensor) -> float:
    rank = a.shape[0]
    return settings.get("lora_alpha", 8) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    def read() -> np.ndarray:
        product = b.read().astype(np.float32) @ a.read().astype(np.float32)
        return (weight.read().astype(np.float32) + scale * product).astype(weight.dtype)

    return dataclasses.replace(weight, read=read)
