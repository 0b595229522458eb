"""The real train step of a config, compiled for a slice that isn't there."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sg4v_jax.data.batch import Batch
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.parallel.rules import RULES
from sg4v_jax.plan.topology import Topology
from sg4v_jax.train import groups
from sg4v_jax.train.setup import Setup, compile_step, set_up


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step as the TPU compiler left it.

    Attributes:
      setup: shapes and shardings of what it works on.
      mesh: of the slice's devices.
      executable: the compiled program; it can't run here.
      rows: of the global batch.
      seconds: that compiling took.
    """

    setup: Setup
    mesh: Mesh
    executable: Any
    rows: int
    seconds: float


def compile_train_step(config: ConfigDict, topology: Topology) -> CompiledStep:
    """Compiles the train step that `train.loop` would run, for every chip of a slice.

    Args:
      config: a run's; what it says of files is not looked at.
      topology: the slice.

    Raises:
      ValueError: the mesh doesn't fit the slice, or the batch doesn't divide by it.
      RuntimeError: there is no TPU compiler, or it ran out of the chip's memory (`OutOfMemory`).
    """
    model = ModelConfig.from_dict(config.model.to_dict())
    mesh = make_mesh(**config.mesh, devices=topology.devices())
    start = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # The number of steps shapes the schedule's values, not the program.
        setup = set_up(config, model, mesh, num_steps=1000)
        params = _abstract(setup.shapes, setup.shardings)
        trainable, frozen = groups.split(params, config.optim.groups)
        opt_state = _abstract(setup.opt_shapes, setup.opt_shardings)
        batch = abstract_batch(config, model, mesh)
        lowered = compile_step(setup, config).lower(trainable, opt_state, frozen, batch)
        executable = lowered.compile()
    return CompiledStep(setup, mesh, executable, config.data.batch_size, time.monotonic() - start)


def abstract_batch(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Batch:
    """A global batch of a config as ShapeDtypeStructs.

    Raises:
      ValueError: its rows don't divide by the mesh.
    """
    rows, length, slots = config.data.batch_size, config.data.seq_len, config.data.image_slots
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (ways * config.train.accumulate):
        raise ValueError(
            f"config.data.batch_size={rows} rows do not divide by data x fsdp = {ways} times "
            f"config.train.accumulate={config.train.accumulate}"
        )
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    size = model.vision.image_size

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    text = struct((rows, length), jnp.int32)
    return Batch(
        tokens=text,
        targets=text,
        loss_weights=struct((rows, length), jnp.float32),
        positions=text,
        segment_ids=text,
        images=struct((rows, slots, size, size, 3), jnp.uint8),
        image_index=text,
    )


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
