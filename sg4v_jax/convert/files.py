"""Checkpoint directories: reading and writing config.json, weight files and their index."""

import contextlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sg4v_jax.convert.tensors import DTYPES, ConversionError

MAX_SHARD_BYTES = 5 * 10**9

# In the order in which transformers looks for them.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Tensors(Mapping[str, np.ndarray]):
    """Tensors of one or more files by name, each read when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def select(self, keep: Callable[[str], bool]) -> "Tensors":
        """Those whose name satisfies `keep`."""
        return Tensors({name: read for name, read in self._readers.items() if keep(name)})

    def __or__(self, other: "Tensors") -> "Tensors":
        return Tensors({**self._readers, **other._readers})


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file with an object.

    Raises:
      ConversionError: there is none, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError([f"{path} does not exist"]) from None
    except (OSError, ValueError) as error:
        raise ConversionError([f"{path} is not JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise ConversionError([f"{path} holds no JSON object but a {type(content).__name__}"])
    return content


def open_tensors(directory: pathlib.Path) -> Tensors:
    """The weights in a checkpoint directory: safetensors or PyTorch files, in one piece or sharded.

    Raises:
      ConversionError: files are missing, truncated or not what their index says.
    """
    found = [directory / name for name in _WEIGHT_FILES if (directory / name).exists()]
    if not found:
        raise ConversionError([f"{directory} has no weights: none of {', '.join(_WEIGHT_FILES)}"])
    return _open_sharded(found[0]) if found[0].suffix == ".json" else open_file(found[0])


def open_file(path: pathlib.Path) -> Tensors:
    """The tensors of one weight file.

    Raises:
      ConversionError: it can't be read.
    """
    return _open_torch(path) if path.suffix == ".bin" else _open_safetensors(path)


def _open_sharded(index: pathlib.Path) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError([f"{index} has no weight_map"])
    tensors = Tensors({})
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        try:
            held = open_file(index.parent / shard)
        except ConversionError as error:
            problems += error.problems
            continue
        promised = {name for name, file in weight_map.items() if file == shard}
        problems += [f"{index}: {shard} lacks {name}" for name in sorted(promised - {*held})]
        problems += [
            f"{index}: {shard} and another shard have {name}" for name in sorted({*held} & {*tensors})
        ]
        tensors |= held
    if problems:
        raise ConversionError(problems)
    return tensors


def _open_safetensors(path: pathlib.Path) -> Tensors:
    try:
        file = safe_open(path, framework="np")
    except FileNotFoundError:
        raise ConversionError([f"{path} does not exist"]) from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ConversionError(
            [f"{path} ({size} bytes) is cut short or is no safetensors file; fetch it again ({error})"]
        ) from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: file.get_tensor(name)

    return Tensors({name: reader(name) for name in file.keys()})  # noqa: SIM118 - a file, not a dict


def _open_torch(path: pathlib.Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            [
                f"{path} is a PyTorch file: install PyTorch to read it (pip install torch), "
                "or convert the checkpoint to safetensors"
            ]
        ) from error
    try:
        # `weights_only` keeps a pickle from running code; `mmap` keeps it out of memory.
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except FileNotFoundError:
        raise ConversionError([f"{path} does not exist"]) from None
    # A damaged file raises whatever its unpickling stumbles over.
    except Exception as error:
        raise ConversionError([f"{path} can't be read as PyTorch weights: {error}"]) from error

    def reader(tensor: "torch.Tensor") -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            # NumPy has no bfloat16 of its own, so that torch can't hand it over as such.
            if tensor.dtype == torch.bfloat16:
                return tensor.contiguous().view(torch.uint16).numpy().view(DTYPES["bfloat16"])
            return tensor.numpy()

        return read

    return Tensors({name: reader(tensor) for name, tensor in tensors.items()})


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str], *, overwrite: bool) -> Iterator[pathlib.Path]:
    """A directory that appears, complete, when the block ends; after an error there is nothing.

    Args:
      directory: where it appears; its parents are made.
      overwrite: whether it may take the place of a directory that isn't empty.

    Yields:
      The directory to write into, beside the one to appear.

    Raises:
      FileExistsError: `directory` isn't empty and may not be overwritten, or is a file.
    """
    target = pathlib.Path(directory).absolute()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty; give overwrite=True to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    partial = target.with_name(f".{target.name}.{unique}.partial")
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _settle(path)
        if target.exists():
            # A directory can't be swapped for another in one step: for a moment there is none.
            old = target.with_name(f".{target.name}.{unique}.old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(path: pathlib.Path) -> None:
    """Gives a new file ordinary permissions (safetensors makes them private) and syncs it to disk."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file the way transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(
    directory: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes safetensors: one file, or shards and their index when it would be larger than a shard.

    Args:
      directory: where to.
      tensors: by name; no more than a shard of them is in memory.
      dtype: a key of `DTYPES`.
      max_shard_bytes: size of a shard; a tensor larger than that has a shard of its own.

    Raises:
      ConversionError: a value is too large for the dtype.
      ValueError: there is no such dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        save_file(pending, directory / f"{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, array in tensors:
        array = _cast(name, array, dtype)
        if pending and sum(held.nbytes for held in pending.values()) + array.nbytes > max_shard_bytes:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.partial").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.partial").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, DTYPES[dtype])
    # Other than bfloat16, float16 has a far smaller range than float32.
    if dtype == "float16" and not np.array_equal(np.isfinite(cast), np.isfinite(array)):
        raise ConversionError([f"{name} has values too large for float16; use bfloat16"])
    return cast
