"""Building blocks shared by the vision tower, the projector and the decoder.

Every module computes in the dtype of its weights: cast the parameter tree and the whole model
follows. Norms and softmax are float32 inside, as in the reference implementations.

Each parameter carries its logical axes in the metadata key `axes`; `parallel.rules` maps them to
mesh axes. A stack of blocks has one more leading axis, `layers`, which the metadata does not name.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sg4v_jax.parallel.rules import constrain

Block = TypeVar("Block", bound=nnx.Module)

_only = jax.checkpoint_policies.save_only_these_names

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # What the decoder and its kernel name; the vision tower, which is small, keeps its blocks' inputs.
    "attention": _only("attended"),
    "mlp": _only("attended", "mlp"),
    "projections": _only("attended", "mlp", "projections"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


def fan_in_normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Truncated normal of variance 1/fan_in (about 0.02 at LLaMA's widths, its `initializer_range`)."""
    return jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) / (0.88 * math.sqrt(fan_in))


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, contracting the last `len(in_shape)` axes of `x`.

    Attributes:
      kernel: float[*in_shape, *out_shape].
      bias: float[*out_shape], or None.
      scale: float32[*out_shape], which multiplies the product where the kernel is int8; None otherwise.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        kernel = fan_in_normal(rngs.params(), (*in_shape, *out_shape), math.prod(in_shape))
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros(out_shape), axes=axes[len(in_shape) :]) if bias else None
        self.scale: nnx.Param | None = None
        self.num_contracted = len(in_shape)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.scale is None:
            y = jnp.tensordot(x, self.kernel[...], axes=self.num_contracted)
        else:
            y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.num_contracted)
            y = (y * self.scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]

    def flat(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
        """The same with all axes of `in_shape`, and of the output, in one: [..., in] to [..., out].

        Heads of fewer than 128 lanes make XLA lay products out as [heads, head_dim, length], which a
        kernel would have to have copied. Merged, they come as the kernel reads them.
        """
        kernel = self.kernel[...]
        y = x @ kernel.reshape(x.shape[-1], -1)
        return y if self.bias is None else y + self.bias[...].reshape(-1)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(size), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """LLaMA's norm: float32 inside, cast, *then* multiply by the weight (spec 3.1)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...]


def stack(build: Callable[[nnx.Rngs], Block], num_layers: int, rngs: nnx.Rngs) -> Block:
    """Builds `num_layers` blocks as one whose parameters have a leading layer axis."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: build(nnx.Rngs(params=key)))(keys)


def run_stack(
    blocks: Block,
    x: Float[Array, "batch length d"],
    body: Callable[[Block, Float[Array, "batch length d"]], Float[Array, "batch length d"]],
    remat: str = "none",
) -> Float[Array, "batch length d"]:
    """Applies stacked `blocks` in turn with `lax.scan`.

    Args:
      blocks: a block whose parameters have a leading layer axis.
      x: the residual stream.
      body: applies one block.
      remat: what the backward pass recomputes. `full` keeps only each block's input. `attention` keeps
        the attention kernel's result as well, `mlp` also the gate and the other inner activation of the
        MLP, `projections` also queries, keys and values. `dots` keeps the results of all matrix products
        with weights but not the kernel's, `none` everything. docs/plan.md has what each costs and saves.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat {remat!r} is not one of {sorted(REMAT_POLICIES)}")

    def step(x: Array, block: Block) -> tuple[Array, None]:
        # Only the carry comes back: returning weights from a scan would stack a copy of them.
        return constrain(body(block, x), ("batch", "length", None)), None

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x, blocks)[0]
