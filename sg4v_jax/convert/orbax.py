"""Checkpoints of training runs, as seen by everything that only wants the model.

A run's directory holds `tokenizer.model` and `checkpoints/<step>/` with the items `params`,
`opt_state`, `data` and `meta`. All are plain dicts, so the files outlive Flax and Optax. A model
converted from elsewhere is a run that has taken no step: `params` and `meta` only.
"""

import asyncio
import collections
import dataclasses
import hashlib
import itertools
import math
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import unflatten_dict

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.checkpoint import Checkpoint, Usage
from sg4v_jax.convert.files import Stream
from sg4v_jax.convert.names import Entry, entries
from sg4v_jax.convert.params import Path, param_shapes, param_tensor, stored_dtypes, to_layer
from sg4v_jax.convert.tensors import ConversionError, Tensor
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model

FORMAT_VERSION = 1
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.model"
# What is read of a stacked parameter at once, when its chunks hold several layers.
_WINDOW_BYTES = 2**30
_CHUNK_BYTES = 2**26
_MAX_UNDER_WAY = 2**28


def is_run(directory: pathlib.Path) -> bool:
    """Whether `directory` is a training run's."""
    return (directory / CHECKPOINTS).is_dir()


def read_meta(directory: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """The `meta` item: model shapes, template, step, tokenizer hash and the run's config."""
    with _manager(directory) as manager:
        step = _step(manager, directory, step)
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if meta["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{directory}: checkpoint format {meta['format_version']}, this version reads {FORMAT_VERSION}"
        )
    return meta


def load_run(directory: pathlib.Path, step: int | None = None) -> ModelBundle:
    """Loads the parameters of a training run, as numpy arrays.

    Args:
      directory: the run's directory.
      step: which checkpoint; the newest by default.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
    """
    meta = read_meta(directory, step)
    config = ModelConfig.from_dict(meta["model"])
    _, shapes, _ = abstract_model(config)
    with _manager(directory) as manager:
        step = _step(manager, directory, step)
        # As host arrays: where they go is for whoever uses them to say.
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        restore = ocp.args.PyTreeRestore(shapes, restore_args=on_host)
        params = manager.restore(step, args=ocp.args.Composite(params=restore)).params
    return ModelBundle(
        config=config,
        params=params,
        tokenizer_file=_tokenizer(directory),
        template=meta["template"],
        aspect=meta["aspect"],
        prompt=meta["prompt"],
    )


def open_run(directory: pathlib.Path, step: int | None = None) -> Checkpoint:
    """Opens the model of a training run without reading it.

    Args:
      directory: the run's directory.
      step: which checkpoint; the newest by default.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
    """
    meta = read_meta(directory, step)
    config = ModelConfig.from_dict(meta["model"])
    with _manager(directory) as manager:
        params = directory / CHECKPOINTS / str(_step(manager, directory, step)) / "params"
    stacks = {path: _Stack(params, path, shape) for path, shape in param_shapes(config).items()}
    tensors: dict[str, Tensor] = {}
    for entry in entries(config):
        stack = stacks[entry.path]
        tensors[entry.key] = param_tensor(entry, stack.shape, stack.dtype, stack.read, str(params))
    vision = dataclasses.replace(config.vision, tuned_from=0)
    usage = {field.name: meta[field.name] for field in dataclasses.fields(Usage) if field.name in meta}
    usage.setdefault("history", {"step": meta["step"], "stage": meta["stage"], "tuned": _tuned(meta, config)})
    return Checkpoint(
        path=directory,
        layout="run",
        tensors=tensors,
        vision=vision,
        text=config.text,
        projector=config.projector,
        features=(vision.select_layer, vision.select_feature),
        tokenizer_file=_tokenizer(directory),
        usage=Usage(**usage),
    )


def write_run(directory: pathlib.Path, checkpoint: Checkpoint, stream: Stream) -> None:
    """Writes a run of no steps, from which training starts and that everything here loads.

    Args:
      directory: an empty one.
      checkpoint: a whole model.
      stream: what reads its tensors; never more than two of them are in memory.

    Raises:
      ConversionError: a tensor can't be read.
    """
    config, usage = checkpoint.config, checkpoint.usage
    meta = {
        "format_version": FORMAT_VERSION,
        "stage": "converted",
        "model": config.to_dict(),
        "step": usage.history.get("step", 0),
        "tokenizer_sha256": "",
        **dataclasses.asdict(usage),
    }
    if checkpoint.tokenizer_file is not None:
        shutil.copyfile(checkpoint.tokenizer_file, directory / TOKENIZER)
        meta["tokenizer_sha256"] = hashlib.sha256((directory / TOKENIZER).read_bytes()).hexdigest()
    writer = _LazyParamHandler()
    registry = ocp.type_handlers.create_type_handler_registry((_LazyParam, writer))
    # Compressing weights saves nothing and takes longer than writing them.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    params = _lazy_params(config, checkpoint.tensors, stream)
    # One layer to a chunk: each is then written in one go.
    args = {
        path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if param.is_stack else ())
        for path, param in params.items()
    }
    with ocp.CheckpointManager(
        (directory / CHECKPOINTS).resolve(),
        item_handlers={"params": handler, "meta": ocp.JsonCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    ) as manager:
        save = ocp.args.PyTreeSave(unflatten_dict(params), save_args=unflatten_dict(args))
        manager.save(0, args=ocp.args.Composite(params=save, meta=ocp.args.JsonSave(meta)))
    if writer.error is not None:
        raise writer.error


@dataclasses.dataclass(frozen=True)
class _LazyParam:
    """A parameter whose layers are read when it is their turn to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    entries: tuple[Entry, ...]
    tensors: tuple[Tensor, ...]
    stream: Stream

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_stack(self) -> bool:
        return self.entries[0].layer is not None

    def layers(self) -> Iterator[tuple[Any, np.ndarray]]:
        """(index, array) of each layer."""
        for entry, array in zip(self.entries, self.stream.arrays(self.tensors), strict=True):
            yield ... if entry.layer is None else entry.layer, array


def _lazy_params(
    config: ModelConfig, tensors: Mapping[str, Tensor], stream: Stream
) -> dict[Path, _LazyParam]:
    shapes, dtypes = param_shapes(config), stored_dtypes(config, tensors)
    groups = itertools.groupby(entries(config), key=lambda entry: entry.path)
    params = {}
    for path, group in groups:
        of_path = tuple(group)
        layers = tuple(
            _as_layer(entry, shapes[path], tensors[entry.key].cast(dtypes[path])) for entry in of_path
        )
        params[path] = _LazyParam(shapes[path], dtypes[path], of_path, layers, stream)
    return params


def _as_layer(entry: Entry, shape: tuple[int, ...], tensor: Tensor) -> Tensor:
    """A tensor that reads as its (layer of a) parameter has it."""
    layer_shape = shape if entry.layer is None else shape[1:]
    return dataclasses.replace(tensor, shape=layer_shape, read=lambda: to_layer(entry, shape, tensor.read()))


class _LazyParamHandler(ocp.type_handlers.NumpyHandler):
    """Writes `_LazyParam`s as NumpyHandler does arrays, but layer by layer.

    A few writes are under way at a time: each waits for the disk, and tensorstore commits together
    what it has together.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()
        self._under_way: collections.deque[tuple[Any, int]] = collections.deque()
        # Whoever makes the directory syncs it once, when it is complete.
        self._context = tensorstore.Context({"file_io_sync": False, "cache_pool#ocdbt": {}})
        self.error: ConversionError | None = None

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        """Leaves its error in `self.error`: raised here, it would fill a screen with Orbax's threads."""
        try:
            await self._write(value, tspec)
        except ConversionError as error:
            self.error = self.error or error

    async def _write(self, value: Any, tspec: Any) -> None:
        writes = []
        async with self._turn:
            if self.error is not None:
                return
            spec = tensorstore.Spec(tspec)
            store = await tensorstore.open(spec, create=True, open=True, context=self._context)
            for index, array in value.layers():
                while self._under_way and self._bytes_under_way() + array.nbytes > _MAX_UNDER_WAY:
                    await self._under_way.popleft()[0]
                writes.append(store[index].write(array))
                self._under_way.append((writes[-1], array.nbytes))
        for write in writes:
            await write

    def _bytes_under_way(self) -> int:
        return sum(nbytes for _, nbytes in self._under_way)


class _Stack:
    """A parameter in a checkpoint's files, read layer by layer."""

    def __init__(self, params: pathlib.Path, path: Path, shape: tuple[int, ...]):
        kvstore = {"driver": "ocdbt", "base": f"file://{params.resolve()}/", "path": ".".join(path) + "/"}
        self._store = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
        self.shape, self.dtype = shape, np.dtype(self._store.dtype.numpy_dtype)
        self._turn = threading.Lock()
        self._window: tuple[range, np.ndarray] = (range(0), np.empty(0))

    def read(self, layer: int | None) -> np.ndarray:
        """One layer, or for None the whole parameter, which then has no layers."""
        if layer is None:
            return self._read(self._store)
        count = self._layers_at_once()
        if count == 1:
            return self._read(self._store[layer])
        with self._turn:
            layers, held = self._window
            if layer not in layers:
                layers = range(layer, min(layer + count, self.shape[0]))
                self._window = (range(0), np.empty(0))  # Let go of the last one first.
                held = self._read(self._store[layers.start : layers.stop])
                self._window = (layers, held)
            return held[layer - layers.start].copy()

    def _read(self, part: Any) -> np.ndarray:
        # Into NumPy's memory, which comes in huge pages: tensorstore's own takes longer to get than to fill.
        array = np.empty(part.shape, self.dtype)
        tensorstore.array(array).write(part).result()
        return array

    def _layers_at_once(self) -> int:
        """As many as share chunks, as far as memory allows."""
        chunk = self._store.chunk_layout.read_chunk.shape
        in_chunk = int((chunk and chunk[0]) or 1)
        layer_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return max(1, min(in_chunk, _WINDOW_BYTES // max(1, layer_bytes)))


def _tuned(meta: dict[str, Any], config: ModelConfig) -> list[str]:
    """What a run trained: parts, and of the vision tower the blocks."""
    groups = meta.get("config", {}).get("optim", {}).get("groups", ())
    first = config.vision.tuned_from
    names = {"tuned": f"vision blocks {first}-{config.vision.num_used_layers - 1}"}
    found: dict[str, None] = {}
    for path in param_shapes(config):
        name = "/".join(path)
        rates = (rate for pattern, rate in groups if re.fullmatch(pattern, name))
        if next(rates, None) is not None:
            part = path[0] if path[0] != "vision" else names.get(path[1], f"vision {path[1]}")
            found[part] = None
    return list(found)


def _tokenizer(directory: pathlib.Path) -> pathlib.Path | None:
    tokenizer = directory / TOKENIZER
    return tokenizer if tokenizer.exists() else None


def _manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        (directory / CHECKPOINTS).resolve(),
        item_names=("params", "opt_state", "data", "meta"),
        options=ocp.CheckpointManagerOptions(read_only=True),
    )


def _step(manager: ocp.CheckpointManager, directory: pathlib.Path, step: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{directory}: no checkpoint of step {step or 'any'}; there are {steps}")
    return steps[-1] if step is None else step
