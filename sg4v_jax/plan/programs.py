"""The real programs of a config, compiled for a slice that isn't there."""

import dataclasses
import math
import re
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
from sg4v_jax.infer.quantize import abstract_quantized
from sg4v_jax.infer.sampling import RowOptions
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.parallel.placement import param_shardings
from sg4v_jax.parallel.rules import RULES, ways
from sg4v_jax.plan.memory import largest_tensors, out_of_memory
from sg4v_jax.plan.topology import Topology
from sg4v_jax.train import groups
from sg4v_jax.train.setup import compile_step, set_up

STEPS = ("train", "prefill", "insert", "decode", "caption")
SERVING = ("prefill", "insert", "decode")


@dataclasses.dataclass(frozen=True)
class Serving:
    """Shapes of generation; what is not here is as `infer.Engine` has it by default.

    Attributes:
      slots: prompts that are decoded at a time, on all chips together.
      prompt: positions of a prompt, its image features included.
      answer: tokens of an answer.
      capacity: positions of a slot's cache.
      weights, kv: `float` (bfloat16) or `int8`.
      prefill_rows: prompts that are prefilled together, at least one for each part of the batch.
      steps: tokens that one program decodes.
    """

    slots: int
    prompt: int = 704
    answer: int = 256
    capacity: int = 1024
    weights: str = "float"
    kv: str = "float"
    prefill_rows: int = 4
    steps: int = 4

    def rows(self, ways: int) -> int:
        """Prompts of one prefill, where the batch is cut into so many parts."""
        return -(-min(self.prefill_rows, self.slots) // ways) * ways


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
      ValueError: the mesh doesn't fit the slice, the batch doesn't divide by it, or the compiler doesn't know
        one of `config.train.compiler_options`.
      OutOfMemory: the compiler says that it doesn't fit.
      RuntimeError: there is no TPU compiler.
    """
    model, mesh = _model_and_mesh(config, topology)
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


def compile_serving(config: ConfigDict, topology: Topology, serving: Serving) -> dict[str, Program]:
    """Compiles what `infer.device` runs: a step of decoding, a prefill, and what puts prompts into slots.

    Raises:
      ValueError: the mesh doesn't fit the slice, or the slots don't divide by it.
      OutOfMemory: the compiler says that it doesn't fit.
      RuntimeError: there is no TPU compiler.
    """
    model, mesh = _model_and_mesh(config, topology)
    parts = ways("batch", mesh)
    if serving.slots % parts:
        raise ValueError(f"{serving.slots} slots do not divide by data x fsdp = {parts}; set --slots")
    dtype = jnp.dtype("bfloat16")
    kv = jnp.dtype("int8") if serving.kv == "int8" else dtype
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        graphdef, shapes, axes = (abstract_quantized if serving.weights == "int8" else abstract_model)(model)
        params = _abstract(_in_bfloat16(shapes, model), param_shardings(shapes, axes, mesh))
        slots = jax.eval_shape(
            lambda: state.State.empty(model.text, serving.slots, serving.capacity, 1, dtype, kv)
        )
        places = state.shardings(slots, mesh)
        slots = _abstract(slots, places)

        def decode(params: Any, slots: state.State) -> Any:
            bound, vocab = nnx.merge(graphdef, params), model.text.vocab_size
            return state.decode(bound, slots, steps=serving.steps, vocab=vocab, stop_ids=(2,))

        def prefill(params: Any, prompts: Any) -> state.Prefix:
            return state.prefill(nnx.merge(graphdef, params), *prompts)

        layouts = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), params)
        decoding = _compile(
            mesh,
            jax.jit(
                decode, donate_argnums=1, in_shardings=(layouts, places), out_shardings=(places, None, None)
            ),
            {"weights": params, "cache": slots},
            serving.slots,
        )
        # Weights lie in memory as decoding reads them; what it doesn't read (the tower) stays as it was.
        formats, _ = decoding.executable.input_formats[0]
        formats = jax.tree.map(lambda form, leaf: form if form.sharding else leaf.sharding, formats, params)
        params = _abstract(params, formats)
        rows = serving.rows(parts)
        prompts = _prompts(model, rows, serving.prompt)
        filling = _compile(mesh, jax.jit(prefill), {"weights": params, "prompts": prompts}, rows)
        prefix = jax.eval_shape(prefill, params, prompts)
        prefix = _abstract(prefix, filling.executable.output_shardings)
        insert = jax.jit(state.insert, donate_argnums=0, out_shardings=places)
        groups = jax.ShapeDtypeStruct((rows,), jnp.int32)
        putting = _compile(mesh, insert, {"cache": slots, "prefix": prefix, "numbers": groups}, rows)
    return {"prefill": filling, "insert": putting, "decode": decoding}


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
    """Bytes on one chip of a tree of ShapeDtypeStructs; those without a sharding count whole."""

    def of(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def _model_and_mesh(config: ConfigDict, topology: Topology) -> tuple[ModelConfig, Mesh]:
    return ModelConfig.from_dict(config.model.to_dict()), make_mesh(**config.mesh, devices=topology.devices())


def _in_bfloat16(shapes: Any, model: ModelConfig) -> Any:
    """Parameters as the engine casts them: int8 kernels and their scales stay."""
    floats = {path for path, _ in jax.tree.leaves_with_path(abstract_model(model)[1])}

    def cast(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        stays = path not in floats or leaf.dtype == jnp.int8
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if stays else jnp.bfloat16)

    return jax.tree.map_with_path(cast, shapes)


def _prompts(model: ModelConfig, rows: int, length: int) -> tuple[Any, ...]:
    """What `infer.state.prefill` gets from the host: prompts of one image each."""
    text = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    size = model.vision.image_size
    images = jax.ShapeDtypeStruct((rows, 1, size, size, 3), jnp.uint8)
    options = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, RowOptions.of([SamplingOptions()] * rows)))
    return text, jax.ShapeDtypeStruct((rows,), jnp.int32), text, images, options


def _compile(mesh: Mesh, function: Any, parts: dict[str, Any], rows: int) -> Program:
    start = time.monotonic()
    lowered = function.lower(*parts.values())
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        failure = out_of_memory(str(error))
        if failure is None:
            if unknown := re.search(r"No such compile option: '(\w+)'", str(error)):
                raise ValueError(
                    f"config.train.compiler_options: the TPU compiler knows no {unknown[1]!r}; "
                    f"{unknown[1]}= leaves it out"
                ) from error
            raise
        if not failure.largest:
            failure.largest = largest_tensors(lowered.as_text(), rows, ways("batch", mesh))
        raise failure from error
    seconds = time.monotonic() - start
    return Program(executable, mesh, {name: chip_bytes(part) for name, part in parts.items()}, seconds)


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
