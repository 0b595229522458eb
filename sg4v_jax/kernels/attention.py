"""The one entry to attention, whatever the hardware. Generation has one of its own: `decoding`.

Layouts are those of `jax.nn.dot_product_attention`: `[batch, length, heads, head_dim]`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels import gpu, reference
from sg4v_jax.kernels.call import Call
from sg4v_jax.kernels.tpu import entry as tpu
from sg4v_jax.kernels.tpu.machine import Machine, current_machine, device_kind
from sg4v_jax.parallel.rules import spec

IMPLEMENTATIONS = ("reference", "tpu", "interpret", "cudnn")
_QUERY = ("batch", "length", "heads", "head_dim")
_KEY = ("batch", "length", "kv_heads", "head_dim")


def attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    causal: bool,
    segment_ids: Int[Array, "batch q_length"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_length heads head_dim"]:
    """Softmax attention with scale 1/sqrt(head_dim) and float32 softmax.

    Args:
      query: queries; `heads` must be a multiple of `kv_heads` (grouped-query attention).
      key: keys.
      value: values.
      causal: position i sees keys 0..i. Needs `q_length == kv_length`.
      segment_ids: positions see only their own segment. Needs `q_length == kv_length`. Padding is
        a segment of its own (0), so no row is ever fully masked.
      implementation: `auto`, or the name of one that must run (an error if it can't): `reference`
        (plain JAX, anywhere), `tpu` (Pallas kernels), `cudnn` (NVIDIA GPUs) or `interpret` (the TPU
        kernels in Pallas' interpreter, anywhere; slow, for tests).

    Returns:
      The attended values, in the dtype of `query`.

    Raises:
      ValueError: on an unknown implementation, one that can't run here or on these arguments, or
        shapes that don't fit together.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads do not divide by {key.shape[2]} key/value heads")
    if (causal or segment_ids is not None) and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"causal and segmented attention need equal lengths, got {query.shape[1]} queries "
            f"and {key.shape[1]} keys"
        )
    call = Call(query, key, value, causal, segment_ids)
    run = _choose(call, implementation)
    if run is None:
        return reference.attention(query, key, value, causal=causal, segment_ids=segment_ids)
    return _on_mesh(run, call)


def _choose(call: Call, implementation: str) -> Callable[[Call], Array] | None:
    """The kernel to run, or None for the reference."""
    wanted = wanted_implementation(implementation)
    if wanted == "reference" or not call.query.size:  # A kernel can't be run on nothing.
        return None
    if wanted == "cudnn":
        reason, run = gpu.refusal(call), gpu.attention
    else:
        machine = current_machine() if wanted == "tpu" else interpreter()
        reason = tpu.refusal(call, machine)

        def run(call: Call) -> Array:
            return tpu.attention(call, machine)

    if reason is None:
        return run
    if implementation == "auto":
        return None
    raise ValueError(f"attention implementation {wanted!r} can't run this: {reason}")


def wanted_implementation(implementation: str) -> str:
    """The implementation that is asked for; an error if it can't run on the devices of the program."""
    kind = device_kind()
    here = "tpu" if "TPU" in kind else "cudnn" if "NVIDIA" in kind else "reference"
    wanted = here if implementation == "auto" else implementation
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {wanted!r} is not one of {sorted(IMPLEMENTATIONS)}")
    if wanted not in (here, "interpret", "reference"):
        raise ValueError(f"attention implementation {wanted!r} can't run on {kind!r}")
    return wanted


def interpreter() -> Machine:
    """A machine that interprets the TPU's kernels."""
    from jax.experimental.pallas import tpu as pltpu

    return Machine("interpret", mxu=128, bf16_exp=False, vmem=100 << 20, interpret=pltpu.InterpretParams())


def _on_mesh(run: Callable[[Call], Array], call: Call) -> Array:
    """Runs a kernel on each device's part of the batch and the heads, by the table of sharding rules.

    XLA can split the reference by itself, but knows nothing of what happens inside a kernel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return run(call)
    query_spec = spec(_QUERY, call.query.shape, mesh)
    call = _repeat_keys(call, _ways(query_spec[2], mesh))
    key_spec = spec(_KEY, call.key.shape, mesh)
    rows = PartitionSpec(query_spec[0])
    specs = {"query": query_spec, "key": key_spec, "value": key_spec, "segment_ids": rows}
    arrays = {name: getattr(call, name) for name in specs if getattr(call, name) is not None}

    def local(arrays: dict[str, Array]) -> Array:
        return run(dataclasses.replace(call, **arrays))  # type: ignore[arg-type]

    in_specs = ({name: specs[name] for name in arrays},)
    return jax.shard_map(local, in_specs=in_specs, out_specs=query_spec, check_vma=False)(arrays)


def _ways(axes: str | tuple[str, ...] | None, mesh: jax.sharding.AbstractMesh) -> int:
    """How many parts a dimension is cut into."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def _repeat_keys(call: Call, ways: int) -> Call:
    """Repeats key heads until they divide among the devices as the query heads do."""
    heads = call.key.shape[2]
    times = math.lcm(heads, ways) // heads
    if times == 1:
        return call
    key, value = (jnp.repeat(x, times, axis=2) for x in (call.key, call.value))
    return dataclasses.replace(call, key=key, value=value)
