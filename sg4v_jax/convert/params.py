"""Tensors of a checkpoint to our parameters, and back."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sg4v_jax.convert.names import LLAMA, Entry, canonical_name, entries, file_shape, from_file, to_file
from sg4v_jax.convert.tensors import DTYPES, ConversionError, Tensor, in_memory
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model

Path = tuple[str, ...]

# What LLaVA adds to the vocabulary in HF's format, `<image>` and `<pad>`, and what it pads it to.
_ADDED_TOKENS, _VOCAB_MULTIPLE = 2, 64


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of a vocabulary in HF's format: 32000 becomes 32064 (spec 5.2)."""
    return -(-(vocab_size + _ADDED_TOKENS) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def by_canonical_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by canonical key, without those that are no parameters.

    One that is there twice keeps its name beside the key, for `check` to find.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = canonical_name(name)
        if key is not None:
            found[f"{key} ({name})" if key in found else key] = tensor
    return found


def check(config: ModelConfig, tensors: Mapping[str, Tensor], part: str = "") -> list[str]:
    """Everything that keeps tensors from being the model's parameters.

    Args:
      config: the model.
      tensors: by canonical key.
      part: `vision`, `projector` or `text`, if they are to be only that.

    Returns:
      A line for every missing, unexpected, doubled or misshapen tensor.
    """
    problems = []
    shapes, rest = param_shapes(config), dict(tensors)
    for entry in entries(config):
        if part and entry.path[0] != part:
            continue
        tensor = rest.pop(entry.key, None)
        if tensor is None:
            problems.append(f"missing {entry.key} (for {'/'.join(entry.path)})")
        elif problem := _mismatch(entry, shapes[entry.path], tensor):
            problems.append(f"{tensor.name} in {tensor.where}: {problem}")
    return problems + [_unexpected(tensor, tensors) for tensor in rest.values()]


def without_added_rows(tensors: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Tensors by canonical key without the rows that HF's format adds to a vocabulary."""
    padded = {row.key for row in LLAMA if row.padded}
    most = padded_vocab_size(vocab_size)
    return {
        key: tensor.head(vocab_size)
        if key in padded and len(tensor.shape) == 2 and vocab_size <= tensor.shape[0] <= most
        else tensor
        for key, tensor in tensors.items()
    }


@functools.lru_cache
def param_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Shapes of our parameters by path."""
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_model(config)[1]).items()}


def to_layer(entry: Entry, shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """A tensor's array as its (layer of a) parameter has it.

    Args:
      entry: what the tensor is.
      shape: that of the whole parameter.
      array: as in a file; rows beyond the vocabulary, which HF's format adds, are dropped.
    """
    shape = shape if entry.layer is None else shape[1:]
    rows = file_shape(entry.row.layout, shape)[0]
    return from_file(entry.row.layout, array[:rows], shape)


def to_params(config: ModelConfig, tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Any]:
    """Parameters from the tensors of a checkpoint.

    Tensors are read one by one, each straight into its place. Dtypes are kept; a stack whose
    layers differ in it becomes float32.

    Args:
      config: the model. Rows beyond its vocabulary, which HF's format adds, are dropped.
      tensors: by name, in any of the layouts of spec 5.

    Returns:
      Arrays with the structure and the shapes of `models.sharegpt4v.abstract_model(config)`.

    Raises:
      ConversionError: with every missing, unexpected, doubled or misshapen tensor.
    """
    wrapped = {
        name: tensor if isinstance(tensor, Tensor) else in_memory(name, tensor)
        for name, tensor in tensors.items()
    }
    found = by_canonical_name(wrapped)
    if problems := check(config, found):
        raise ConversionError(problems)
    return unflatten_dict(dict(read_params(config, found, stored_dtypes(config, found))))


def read_params(
    config: ModelConfig, tensors: Mapping[str, Tensor], dtypes: Mapping[Path, np.dtype]
) -> Iterator[tuple[Path, np.ndarray]]:
    """Parameters one by one: of the paths in `dtypes`, in those dtypes.

    Args:
      config: the model.
      tensors: by canonical key; `check` found nothing wrong with those that are read.
      dtypes: of each parameter by path.
    """
    shapes = param_shapes(config)
    for path, group in itertools.groupby(entries(config), key=lambda entry: entry.path):
        if path not in dtypes:
            continue
        leaf = np.empty(shapes[path], dtypes[path])
        for entry in group:
            where = ... if entry.layer is None else entry.layer
            leaf[where] = to_layer(entry, shapes[path], tensors[entry.key].read())
        yield path, leaf


def stored_dtypes(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[Path, np.dtype]:
    """The dtype of each parameter: that of its tensors, or float32 where they differ."""
    dtypes: dict[Path, np.dtype] = {}
    for entry in entries(config):
        dtype = tensors[entry.key].dtype
        if dtypes.setdefault(entry.path, dtype) != dtype:
            dtypes[entry.path] = DTYPES["float32"]
    return dtypes


def from_params(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a checkpoint from parameters: the inverse of `to_params`.

    Args:
      config: the model, with the split of the vision tower that `params` have.
      params: NumPy or JAX arrays; each layer is brought to the host only when it is read.

    Returns:
      Tensors by canonical key.

    Raises:
      ConversionError: with every missing, unexpected or misshapen parameter.
    """
    shapes, leaves = param_shapes(config), flatten_dict(params)
    problems = [f"missing {'/'.join(path)}" for path in shapes if path not in leaves]
    for path, leaf in leaves.items():
        if path not in shapes:
            problems.append(f"unexpected {'/'.join(map(str, path))}")
        elif tuple(leaf.shape) != shapes[path]:
            problems.append(f"{'/'.join(path)}: expected shape {shapes[path]}, found {tuple(leaf.shape)}")
    if problems:
        raise ConversionError(problems)
    return dict(_tensors(config, leaves))


def _tensors(config: ModelConfig, leaves: Mapping[Path, Any]) -> Iterator[tuple[str, Tensor]]:
    for entry in entries(config):

        def read(layer: int | None, leaf: Any = leaves[entry.path]) -> np.ndarray:
            return np.asarray(jax.device_get(leaf if layer is None else leaf[layer]))

        yield entry.key, param_tensor(entry, leaves[entry.path].shape, leaves[entry.path].dtype, read)


def param_tensor(
    entry: Entry, shape: tuple[int, ...], dtype: Any, read_layer: Any, where: str = "memory"
) -> Tensor:
    """One of our parameters, or a layer of one, as a checkpoint's tensor.

    Args:
      entry: what it is.
      shape: that of the whole parameter.
      dtype: its dtype.
      read_layer: gives the layer `entry.layer`, or the parameter for None.
      where: the file, for messages.
    """
    stored = file_shape(entry.row.layout, shape if entry.layer is None else shape[1:])
    return Tensor(
        entry.key,
        stored,
        np.dtype(dtype),
        where,
        lambda: to_file(entry.row.layout, read_layer(entry.layer)),
    )


def _unexpected(tensor: Tensor, tensors: Mapping[str, Tensor]) -> str:
    key = canonical_name(tensor.name)
    if key is None or key not in tensors or tensors[key] is tensor:
        return f"unexpected {tensor.name} in {tensor.where}"
    return f"{tensor.name} in {tensor.where}: the same tensor as {tensors[key].name} (both are {key})"


def _mismatch(entry: Entry, shape: tuple[int, ...], tensor: Tensor) -> str | None:
    """What keeps a tensor from being part of a parameter of `shape`."""
    if tensor.dtype not in DTYPES.values():
        return f"expected a dtype of {', '.join(DTYPES)}, found {tensor.dtype}"
    expected = file_shape(entry.row.layout, shape if entry.layer is None else shape[1:])
    if tensor.shape == expected:
        return None
    if entry.row.padded and tensor.shape[1:] == expected[1:]:
        most = padded_vocab_size(expected[0])
        if expected[0] <= tensor.shape[0] <= most:
            return None
        return f"expected {expected[0]} to {most} rows of {expected[1:]}, found {tensor.shape[0]}"
    return f"expected shape {expected}, found {tensor.shape}"
