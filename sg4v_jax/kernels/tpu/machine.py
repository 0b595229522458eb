"""What the kernels have to know about a generation of TPUs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Machine:
    """One TensorCore.

    Attributes:
      name: `v4`, `v5e`, `v5p`, `v6e`; others as JAX names them.
      mxu: width of the matrix unit.
      bf16_exp: whether the exponential can take and give bfloat16.
      vmem: bytes that a kernel may use.
      interpret: parameters of Pallas' interpreter, or False to compile.
    """

    name: str
    mxu: int
    bf16_exp: bool
    vmem: int
    interpret: Any = False

    def exp_dtype(self, dtype: Any) -> Any:
        """Dtype of the exponential for operands of `dtype`."""
        return jnp.bfloat16 if self.bf16_exp and dtype == jnp.bfloat16 else jnp.float32


def device_kind() -> str:
    """Kind of the devices that the program is for: those of the mesh in scope, or the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def current_machine() -> Machine:
    """The TPU that the program is for."""
    info = pltpu.get_tpu_info()
    # An eighth stays with the compiler.
    return Machine(
        name=str(info.chip_version),
        mxu=info.mxu_column_size,
        bf16_exp=info.generation >= 6,
        vmem=info.vmem_capacity_bytes * 7 // 8,
    )
