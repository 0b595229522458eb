"""Checkpoint directories: JSON, weight files and their index, and directories that appear whole."""

import collections
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from sg4v_jax.convert.safetensors_file import open_safetensors, write_safetensors
from sg4v_jax.convert.tensors import ConversionError, Tensor, count_not_finite, is_finite
from sg4v_jax.convert.torch_file import open_torch

MAX_SHARD_BYTES = 5 * 10**9
_READERS = 2

# In the order in which transformers looks for them.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file the way transformers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def has_weights(directory: pathlib.Path) -> bool:
    """Whether there is any file that `open_tensors` would read."""
    return any((directory / name).exists() for name in _WEIGHT_FILES)


def open_tensors(directory: pathlib.Path) -> dict[str, Tensor]:
    """The weights in a checkpoint directory: safetensors or PyTorch files, in one piece or sharded.

    Raises:
      ConversionError: files are missing, truncated or not what their index says.
    """
    found = [directory / name for name in _WEIGHT_FILES if (directory / name).exists()]
    if not found:
        raise ConversionError([f"{directory} has no weights: none of {', '.join(_WEIGHT_FILES)}"])
    return _open_sharded(found[0]) if found[0].suffix == ".json" else open_file(found[0])


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one weight file.

    Raises:
      ConversionError: it can't be read.
    """
    if not path.is_file():
        raise ConversionError([f"{path} does not exist"])
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def _open_sharded(index: pathlib.Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConversionError([f"{index} has no weight_map of file names"])
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard:
            problems.append(f"{index}: {shard!r} is no name of a file beside it")
            continue
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


def read_ahead(tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """The tensors' arrays in order; the next two are read while one is used."""
    with ThreadPoolExecutor(_READERS) as readers:
        pending: collections.deque[Future[np.ndarray]] = collections.deque()
        for tensor in tensors:
            pending.append(readers.submit(tensor.read))
            if len(pending) > _READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Stream:
    """Tensors read one after the other: counted, and looked through for NaN.

    Args:
      progress: called with the size of each in bytes.
      allow_not_finite: whether NaN and infinity pass.
    """

    def __init__(self, progress: Callable[[int], object] | None = None, *, allow_not_finite: bool = False):
        self._progress = progress or (lambda nbytes: None)
        self._allow_not_finite = allow_not_finite
        self._problems: list[str] = []

    def arrays(self, tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
        """The tensors' arrays in order."""
        for tensor, array in zip(tensors, read_ahead(tensors), strict=True):
            if not (self._allow_not_finite or is_finite(array)):
                count = count_not_finite(array)
                self._problems.append(f"{tensor.name} in {tensor.where}: {count} values are NaN or infinite")
            yield array
            self._progress(array.nbytes)

    def finish(self) -> None:
        """Call when all is read.

        Raises:
          ConversionError: naming every tensor that has NaN or infinite values.
        """
        if self._problems:
            raise ConversionError([*self._problems, "--allow-nan converts it nevertheless"])


def write_tensors(
    directory: pathlib.Path,
    tensors: Sequence[Tensor],
    stream: Stream,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes safetensors: one file, or shards and their index when it would be larger than a shard.

    Args:
      directory: where to.
      tensors: what to write; a few of them are in memory at a time.
      stream: what reads them.
      max_shard_bytes: size of a shard; a tensor larger than that has a shard of its own.

    Raises:
      ConversionError: a value is too large for its dtype, or a file can't be read.
    """
    shards = _shards(tensors, max_shard_bytes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        # The wider dtypes first, so that each tensor lies at a multiple of its own.
        shard.sort(key=lambda tensor: -tensor.dtype.itemsize)
        specs = [(tensor.name, tensor.shape, tensor.dtype) for tensor in shard]
        write_safetensors(directory / file, specs, stream.arrays(shard))
    if len(shards) > 1:
        weight_map = {
            tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _shards(tensors: Sequence[Tensor], max_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str], *, overwrite: bool) -> Iterator[pathlib.Path]:
    """A directory that appears, complete, when the block ends; after an error there is nothing.

    What a killed process left behind is removed by the next that writes there.

    Args:
      directory: where it appears; its parents are made.
      overwrite: whether it may take the place of a directory that isn't empty.

    Yields:
      The directory to write into, beside the one to appear.

    Raises:
      FileExistsError: `directory` isn't empty and may not be overwritten, is a file, or is being
        written by another process.
    """
    target = pathlib.Path(directory).absolute()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty; --overwrite (overwrite=True) replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    with _claimed(partial):
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                # A directory can't be swapped for another in one step: for a moment there is none.
                target.rename(old)
            partial.rename(target)
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # A write that fails, for want of room, doesn't say where.
            raise OSError(error.errno, error.strerror, os.fspath(target)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not target.exists():
                # An error, or once a kill, between the two renames: what was there comes back.
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _claimed(partial: pathlib.Path) -> Iterator[None]:
    """Makes a directory, empties it and locks it against other processes."""
    taken = FileExistsError(f"{partial} is being written by another process")
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        # Between opening and locking, another may have finished it and given it its final name.
        if not partial.exists() or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise taken
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        os.close(descriptor)
