"""The real programs of a config, compiled for a slice that isn't there."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sg4v_jax.data.batch import Batch
from sg4v_jax.infer import state
from sg4v_jax.infer.options import SamplingOptions
from sg4v_jax.infer.sampling import RowOptions
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.parallel.placement import param_shardings
from sg4v_jax.parallel.rules import RULES, sharding, ways
from sg4v_jax.plan.memory import largest_tensors, out_of_memory
from sg4v_jax.plan.topology import Topology
from sg4v_jax.train import groups
from sg4v_jax.train.setup import compile_step, set_up

STEPS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Serving:
    """Shapes of generation.

    Attributes:
      slots: prompts that are decoded at a time, on all chips together.
      prompt: positions of a prompt, its image features included.
      capacity: positions of a slot's cache.
    """

    slots: int
    prompt: int = 704
    capacity: int = 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      executable: it can't run here.
      mesh: of the slice's devices.
      arguments: bytes on one chip of what it gets, by part: weights, optimizer, ...
      seconds: that compiling took.
    """

    executable: Any
    mesh: Mesh
    arguments: dict[str, int]
    seconds: float


def compile_train(config: ConfigDict, topology: Topology) -> Program:
    """Compiles the train step that `train.loop` would run, for every chip of a slice.

    Args:
      config: a run's; what it says of files is not looked at.
      topology: the slice.

    Raises:
      ValueError: the mesh doesn't fit the slice, or the batch doesn't divide by it.
      OutOfMemory: the compiler says that it doesn't fit.
      RuntimeError: there is no TPU compiler.
    """
    model = ModelConfig.from_dict(config.model.to_dict())
    mesh = make_mesh(**config.mesh, devices=topology.devices())
    batch = abstract_batch(config, model, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # The number of steps shapes the schedule's values, not the program.
        setup = set_up(config, model, mesh, num_steps=1000)
        trainable, frozen = groups.split(_abstract(setup.shapes, setup.shardings), config.optim.groups)
        opt_state = _abstract(setup.opt_shapes, setup.opt_shardings)
        step = compile_step(setup, config)
        parts = {
            "trained weights": trainable,
            "optimizer": opt_state,
            "frozen weights": frozen,
            "batch": batch,
        }
        return _compile(mesh, step, parts, config.data.batch_size)


def compile_serving(config: ConfigDict, topology: Topology, step: str, serving: Serving) -> Program:
    """Compiles the prefill of one image and prompt per chip, or one decoding step of all slots.

    Raises:
      ValueError: the mesh doesn't fit the slice, or the slots don't divide by it.
      OutOfMemory: the compiler says that it doesn't fit.
      RuntimeError: there is no TPU compiler.
    """
    model = ModelConfig.from_dict(config.model.to_dict())
    mesh = make_mesh(**config.mesh, devices=topology.devices())
    parts = ways("batch", mesh)
    if serving.slots % parts:
        raise ValueError(f"{serving.slots} slots do not divide by data x fsdp = {parts}; set --slots")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        graphdef, shapes, axes = abstract_model(model)
        weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes)
        params = _abstract(weights, param_shardings(shapes, axes, mesh))

        def prefill(params: Any, batch: Any) -> Any:
            return state.prefill(nnx.merge(graphdef, params), *batch)

        def decode(params: Any, slots: state.State) -> Any:
            bound, vocab = nnx.merge(graphdef, params), model.text.vocab_size
            return state.decode(bound, slots, steps=1, vocab=vocab, stop_ids=(2,))

        if step == "prefill":
            batch = _prompts(model, mesh, parts, serving.prompt)
            return _compile(mesh, jax.jit(prefill), {"weights": params, "batch": batch}, parts)
        slots, places = _slots(model, mesh, serving)
        # As `infer.device` asks for it: weights lie in memory as decoding reads them.
        layouts = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), params)
        function = jax.jit(
            decode, donate_argnums=1, in_shardings=(layouts, places), out_shardings=(places, None, None)
        )
        return _compile(mesh, function, {"weights": params, "cache": slots}, serving.slots)


def abstract_batch(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Batch:
    """A global batch of a config as ShapeDtypeStructs.

    Raises:
      ValueError: its rows don't divide by the mesh.
    """
    rows, length, slots = config.data.batch_size, config.data.seq_len, config.data.image_slots
    parts = ways("batch", mesh)
    if rows % (parts * config.train.accumulate):
        raise ValueError(
            f"config.data.batch_size={rows} rows do not divide by data x fsdp = {parts} times "
            f"config.train.accumulate={config.train.accumulate}"
        )
    placed = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    size = model.vision.image_size

    def struct(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    text = struct((rows, length), jnp.int32)
    return Batch(
        tokens=text,
        targets=text,
        loss_weights=struct((rows, length), jnp.float32),
        positions=text,
        segment_ids=text,
        images=struct((rows, slots, size, size, 3), jnp.uint8),
        image_index=text,
        kinds=text,
    )


def chip_bytes(tree: Any) -> int:
    """Bytes on one chip of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _prompts(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> tuple[Any, ...]:
    """What `infer.state.prefill` gets: prompts of one image each."""

    def placed(leaf: Any) -> Any:
        axes = ("batch", *[None] * (len(leaf.shape) - 1))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(axes, leaf.shape, mesh))

    text = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    size = model.vision.image_size
    images = jax.ShapeDtypeStruct((rows, 1, size, size, 3), jnp.uint8)
    options = RowOptions.of([SamplingOptions()] * rows)
    return jax.tree.map(placed, (text, jax.ShapeDtypeStruct((rows,), jnp.int32), text, images, options))


def _slots(model: ModelConfig, mesh: Mesh, serving: Serving) -> tuple[Any, Any]:
    """The engine's state as ShapeDtypeStructs, and its shardings."""
    dtype = jnp.dtype("bfloat16")
    shapes = jax.eval_shape(
        lambda: state.State.empty(model.text, serving.slots, serving.capacity, 1, dtype, dtype)
    )
    places = state.shardings(shapes, mesh)
    return _abstract(shapes, places), places


def _compile(mesh: Mesh, function: Any, parts: dict[str, Any], rows: int) -> Program:
    start = time.monotonic()
    lowered = function.lower(*parts.values())
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        failure = out_of_memory(str(error))
        if failure is None:
            raise
        if not failure.largest:
            failure.largest = largest_tensors(lowered.as_text(), rows, ways("batch", mesh))
        raise failure from error
    seconds = time.monotonic() - start
    return Program(executable, mesh, {name: chip_bytes(part) for name, part in parts.items()}, seconds)


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
