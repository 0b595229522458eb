"""Tensors of a checkpoint to our parameters, and back."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sg4v_jax.convert.names import Entry, canonical_name, entries, file_shape, from_file, to_file
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model

Path = tuple[str, ...]

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, not read yet.

    Attributes:
      name: what its file calls it.
      shape: as in the file.
      dtype: one of `DTYPES`' values, or another that a file can hold.
      where: the file, for messages.
      read: gives a new array, read from the file each time. No memory map: mapped pages of a file
        that something cuts short kill the process, and count as its memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# What LLaVA adds to the vocabulary in HF's format, `<image>` and `<pad>`, and what it pads it to.
_ADDED_TOKENS, _VOCAB_MULTIPLE = 2, 64


class ConversionError(ValueError):
    """A checkpoint that can't be converted.

    Attributes:
      problems: everything that is wrong with it, not just the first thing found.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = f"{len(problems)} problems:\n  " if len(problems) > 1 else ""
        super().__init__(count + "\n  ".join(problems))


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of a vocabulary in HF's format: 32000 becomes 32064 (spec 5.2)."""
    return -(-(vocab_size + _ADDED_TOKENS) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def to_params(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters from the tensors of a checkpoint.

    Tensors are read one by one, each straight into its place, so that a lazy mapping never has
    more than one in memory. Dtypes are kept; a stack whose layers differ in it becomes float32.

    Args:
      config: the model. Rows beyond its vocabulary, which HF's format adds, are dropped.
      tensors: by name, in any of the layouts of spec 5.

    Returns:
      Arrays with the structure and the shapes of `models.sharegpt4v.abstract_model(config)`.

    Raises:
      ConversionError: with every missing, unexpected, doubled or misshapen tensor.
    """
    names, problems = _by_canonical_name(tensors)
    shapes = _shapes(config)
    params: dict[Path, np.ndarray] = {}
    for entry in entries(config):
        name = names.pop(entry.key, None)
        if name is None:
            problems.append(f"missing {entry.key} (for {'/'.join(entry.path)})")
            continue
        array = tensors[name]
        problem = _mismatch(entry, shapes[entry.path], array)
        if problem:
            problems.append(f"{name}: {problem}")
        else:
            _place(params, entry, shapes[entry.path], array)
    problems += [f"unexpected {name}" for name in names.values()]
    if problems:
        raise ConversionError(problems)
    return unflatten_dict(params)


def from_params(config: ModelConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a checkpoint from parameters: the inverse of `to_params`.

    Args:
      config: the model, with the split of the vision tower that `params` have.
      params: NumPy or JAX arrays; each is brought to the host only when its turn comes.

    Returns:
      An iterator over (canonical key, array).

    Raises:
      ConversionError: at once, with every missing, unexpected or misshapen parameter.
    """
    shapes, leaves = _shapes(config), flatten_dict(params)
    problems = [f"missing {'/'.join(path)}" for path in shapes if path not in leaves]
    for path, leaf in leaves.items():
        if path not in shapes:
            problems.append(f"unexpected {'/'.join(map(str, path))}")
        elif tuple(leaf.shape) != shapes[path]:
            problems.append(f"{'/'.join(path)}: expected shape {shapes[path]}, found {tuple(leaf.shape)}")
    if problems:
        raise ConversionError(problems)
    return _tensors(config, leaves)


def _tensors(config: ModelConfig, leaves: Mapping[Path, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for path, group in itertools.groupby(entries(config), key=lambda entry: entry.path):
        leaf = np.asarray(leaves[path])
        for entry in group:
            yield entry.key, to_file(entry.row.layout, leaf if entry.layer is None else leaf[entry.layer])


def _by_canonical_name(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, str], list[str]]:
    names: dict[str, str] = {}
    problems = []
    for name in tensors:
        key = canonical_name(name)
        if key is None:
            continue
        if key in names:
            problems.append(f"{name}: the same tensor as {names[key]} (both are {key})")
        else:
            names[key] = name
    return names, problems


def _shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_model(config)[1]).items()}


def _layer_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if entry.layer is None else shape[1:]


def _mismatch(entry: Entry, shape: tuple[int, ...], array: np.ndarray) -> str | None:
    """What keeps `array` from being part of a parameter of `shape`."""
    if array.dtype not in DTYPES.values():
        return f"expected a dtype of {', '.join(DTYPES)}, found {array.dtype}"
    expected = file_shape(entry.row.layout, _layer_shape(entry, shape))
    if array.shape == expected:
        return None
    if entry.row.padded and array.shape[1:] == expected[1:]:
        most = padded_vocab_size(expected[0])
        if expected[0] <= array.shape[0] <= most:
            return None
        return f"expected {expected[0]} to {most} rows of {expected[1:]}, found {array.shape[0]}"
    return f"expected shape {expected}, found {array.shape}"


def _place(params: dict[Path, np.ndarray], entry: Entry, shape: tuple[int, ...], array: np.ndarray) -> None:
    """Copies a tensor of a checkpoint to its place in `params`, which it makes when it is the first."""
    leaf = params.get(entry.path)
    if leaf is None:
        leaf = params[entry.path] = np.zeros(shape, array.dtype)
    elif leaf.dtype != array.dtype:
        leaf = params[entry.path] = leaf.astype(np.float32, copy=False)
    layout, shape = entry.row.layout, _layer_shape(entry, shape)
    # Only a vocabulary can have more rows than expected: `_mismatch` saw to it.
    rows = file_shape(layout, shape)[0]
    leaf[... if entry.layer is None else entry.layer] = from_file(layout, array[:rows], shape)
