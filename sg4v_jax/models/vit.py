"""CLIP's vision transformer, up to the layer LLaVA takes its features from.

The blocks form three stacks: `frozen` (0..k-1), `tuned` (k..22 of ViT-L) and `unused` (23). The
first is kept apart so that training from block k on (k = `VisionConfig.tuned_from`) costs nothing
for the blocks below. The last, with `post_norm`, is never computed; it is carried so that an
exported tower is complete. A stack without blocks is None.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sg4v_jax.kernels.attention import attention
from sg4v_jax.models.config import VisionConfig
from sg4v_jax.models.layers import LayerNorm, Linear, run_stack, stack


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


class Attention(nnx.Module):
    """Self-attention over all patches, with biases."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        heads = (config.num_heads, config.hidden_size // config.num_heads)
        into = ("embed", "heads", "head_dim")
        self.query = Linear((config.hidden_size,), heads, into, bias=True, rngs=rngs)
        self.key = Linear((config.hidden_size,), heads, into, bias=True, rngs=rngs)
        self.value = Linear((config.hidden_size,), heads, into, bias=True, rngs=rngs)
        self.out = Linear(heads, (config.hidden_size,), ("heads", "head_dim", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "images length d"]) -> Float[Array, "images length d"]:
        heads = self.query.kernel.shape[1:]
        layers = (self.query, self.key, self.value)
        query, key, value = (layer.flat(x).reshape(*x.shape[:-1], *heads) for layer in layers)
        attended = attention(query, key, value, causal=False)
        return self.out.flat(attended.reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
    """Two layers with quick GELU."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        hidden, inner = (config.hidden_size,), (config.intermediate_size,)
        self.up = Linear(hidden, inner, ("embed", "mlp"), bias=True, rngs=rngs)
        self.down = Linear(inner, hidden, ("mlp", "embed"), bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "images length d"]) -> Float[Array, "images length d"]:
        return self.down(quick_gelu(self.up(x)))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "images length d"]) -> Float[Array, "images length d"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nnx.Module):
    """Images to patch features (spec 3.1; Radford et al. 2021)."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size

        def blocks(count: int) -> Block | None:
            return stack(lambda rngs: Block(config, rngs), count, rngs) if count else None

        self.config = config
        self.patch_embedding = Linear(
            (patch, patch, 3), (width,), (None, None, None, "embed"), bias=False, rngs=rngs
        )
        positions = (config.num_patches + 1, width)
        self.class_embedding = nnx.Param(0.5 * jax.random.normal(rngs.params(), (width,)), axes=(None,))
        self.position_embedding = nnx.Param(
            0.5 * jax.random.normal(rngs.params(), positions), axes=(None, "embed")
        )
        self.pre_norm = LayerNorm(width, config.norm_eps)
        self.frozen = blocks(config.tuned_from)
        self.tuned = blocks(config.num_used_layers - config.tuned_from)
        self.unused = blocks(config.num_layers - config.num_used_layers)
        self.post_norm = LayerNorm(width, config.norm_eps)

    def __call__(
        self, images: Float[Array, "images height width 3"], remat: str = "none"
    ) -> Float[Array, "images tokens d"]:
        """Features of normalised images: float[images, num_image_tokens, hidden_size].

        Args:
          images: float[images, image_size, image_size, 3], normalised with CLIP's statistics.
          remat: see `layers.run_stack`; applies to the tuned blocks only.
        """
        x = self.patch_embedding(_patches(images, self.config.patch_size))
        cls = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding[...]
        x = self.pre_norm(x)
        if self.frozen is not None:
            x = run_stack(self.frozen, x, lambda block, x: block(x))
        if self.tuned is not None:
            x = run_stack(self.tuned, x, lambda block, x: block(x), remat)
        return x[:, 1:] if self.config.select_feature == "patch" else x


def _patches(
    images: Float[Array, "images height width 3"], size: int
) -> Float[Array, "images patches size size 3"]:
    """Cuts images into patches, row by row; pixels that fill no whole patch are dropped."""
    count, rows, columns = images.shape[0], images.shape[1] // size, images.shape[2] // size
    images = images[:, : rows * size, : columns * size]
    patches = images.reshape(count, rows, size, columns, size, 3).swapaxes(2, 3)
    return patches.reshape(count, rows * columns, size, size, 3)
