"""Which of the TPU kernels takes a call, and with which blocks."""

from jaxtyping import Array

from sg4v_jax.kernels.call import Call
from sg4v_jax.kernels.tpu import flash, flash_plan, vit
from sg4v_jax.kernels.tpu.blocks import choice
from sg4v_jax.kernels.tpu.machine import Machine


def refusal(call: Call, machine: Machine) -> str | None:
    """Why no kernel takes this call, or None if one does."""
    if call.query.dtype not in ("bfloat16", "float32"):
        return f"dtype {call.query.dtype} is neither bfloat16 nor float32"
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        return "query, key and value differ in dtype"
    if call.causal:
        return None
    if call.segment_ids is not None:
        return "segments without causality have no kernel"
    if call.query.shape != call.key.shape:
        return "without causality, queries and keys need equal lengths and heads"
    settings = vit.Settings(*choice(machine.name).vit, machine)
    padded = (*call.query.shape[:3], -(-call.query.shape[3] // 128) * 128)
    if not any(vit.fits(settings, shape, call.query.dtype.itemsize) for shape in (call.query.shape, padded)):
        return f"rows of {call.query.shape[1]} scores do not fit into {machine.vmem >> 20} MiB"
    return None


def attention(call: Call, machine: Machine) -> Array:
    """Runs the kernel for a call that `refusal` has nothing against."""
    table = choice(machine.name)
    query, key, value = call.query, call.key, call.value
    if call.causal:
        blocks = table.causal if call.segment_ids is None else table.packed
        settings = flash_plan.Settings(*blocks, machine)
        return flash.attention(query, key, value, call.segment_ids, settings)
    return vit.attention(query, key, value, vit.Settings(*table.vit, machine))
