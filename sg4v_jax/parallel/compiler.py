"""What the TPU compiler is told about a train step, by generation: how collectives run beside other work.

docs/plan.md ("What the compiler is told") has what each is worth. The options are those of
`LIBTPU_INIT_ARGS` that MaxText and axlearn publish for these generations; libtpu documents none of them.
"""

import jax

# Gathers, reductions and scatters run on the SparseCores of v6e, while its TensorCore computes. By itself
# the compiler leaves them alone, as fusing them with products (`..._fuse_...`) is for v5e only.
_ON_SPARSE_CORES = {
    "xla_enable_async_all_gather": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": "true",
}
# By the start of a device's `device_kind`.
OPTIONS = {"TPU v6": _ON_SPARSE_CORES}


def compiler_options(device: jax.Device, extra: str = "") -> dict[str, str]:
    """Options for programs that train on a kind of device, as `jax.jit` takes them.

    Args:
      device: any of the mesh.
      extra: `name=value,name=value` that are added to those of `OPTIONS`; `name=` takes one of them away.

    Raises:
      ValueError: if `extra` is written otherwise. A name that the compiler doesn't know is its own error.
    """
    if device.platform != "tpu":
        return {}
    known = (options for kind, options in OPTIONS.items() if device.device_kind.startswith(kind))
    found = dict(next(known, {}))
    for part in filter(None, extra.split(",")):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not name or not equals:
            raise ValueError(f"config.train.compiler_options: {part!r} is not of the form name=value")
        found[name] = value
    return {name: value for name, value in found.items() if value}
