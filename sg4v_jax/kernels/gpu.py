"""Attention on an NVIDIA GPU: cuDNN's flash attention where it can, the reference elsewhere.

Not run on a GPU yet. cuDNN's rules are those of `jax.nn.dot_product_attention(implementation="cudnn")`: it
broadcasts key heads to query heads by itself, and takes a mask as a bias in the queries' dtype, which lies in
memory as [batch, 1, length, length], once for all heads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sg4v_jax.kernels.call import Call


def refusal(call: Call) -> str | None:
    """Why cuDNN does not take this call, or None if it does."""
    head_dim = call.query.shape[-1]
    if call.query.dtype not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, not {call.query.dtype}"
    if not call.query.dtype == call.key.dtype == call.value.dtype:
        return "query, key and value differ in dtype"
    if head_dim % 8 or head_dim > 128:
        return f"cuDNN takes head_dim up to 128 in multiples of 8, not {head_dim}"
    if call.segment_ids is not None and call.query.shape[1] % 2:
        # Forward it would, but then the backward pass is an error.
        return f"with segments cuDNN's backward pass takes even lengths, not {call.query.shape[1]}"
    return None


def attention(call: Call) -> Array:
    """cuDNN's attention; segments become a mask, [batch, 1, length, length], shared by the heads."""
    mask = None
    if call.segment_ids is not None:
        mask = (call.segment_ids[:, None, :, None] == call.segment_ids[:, None, None, :]).astype(jnp.bool_)
    return jax.nn.dot_product_attention(
        call.query, call.key, call.value, mask=mask, is_causal=call.causal, implementation="cudnn"
    )
