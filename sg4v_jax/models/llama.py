"""LLaMA decoder with grouped-query attention and a KV cache (Touvron et al. 2023; spec 3.1)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels.attention import attention
from sg4v_jax.kernels.decoding import branch_attention, decode_attention
from sg4v_jax.models.cache import KVCache
from sg4v_jax.models.config import TextConfig
from sg4v_jax.models.layers import Linear, RMSNorm, run_stack, stack
from sg4v_jax.parallel.rules import constrain


def rotary_angles(
    positions: Int[Array, "batch length"], config: TextConfig
) -> tuple[Float[Array, "batch length 1 half"], Float[Array, "batch length 1 half"]]:
    """Cosine and sine of the rotary embedding at `positions`, in float32."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    angles: tuple[Float[Array, "batch length 1 half"], Float[Array, "batch length 1 half"]],
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates (first half, second half) pairs: the layout of HF LLaMA weights."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention without biases."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        width = (config.hidden_size,)
        q_shape, kv_shape = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.query = Linear(width, q_shape, q_axes, bias=False, rngs=rngs)
        self.key = Linear(width, kv_shape, kv_axes, bias=False, rngs=rngs)
        self.value = Linear(width, kv_shape, kv_axes, bias=False, rngs=rngs)
        self.out = Linear(q_shape, width, ("heads", "head_dim", "embed"), bias=False, rngs=rngs)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        width, inner = (config.hidden_size,), (config.intermediate_size,)
        self.gate = Linear(width, inner, ("embed", "mlp"), bias=False, rngs=rngs)
        self.up = Linear(width, inner, ("embed", "mlp"), bias=False, rngs=rngs)
        self.down = Linear(inner, width, ("mlp", "embed"), bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length d"]) -> Float[Array, "batch length d"]:
        gate, up = (checkpoint_name(layer(x), "mlp") for layer in (self.gate, self.up))
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Pre-norm decoder block, in two halves around the attention."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, rngs)

    def project(
        self, x: Float[Array, "batch length d"], angles: tuple[Array, Array]
    ) -> tuple[
        Float[Array, "batch length heads head_dim"],
        Float[Array, "batch length kv_heads head_dim"],
        Float[Array, "batch length kv_heads head_dim"],
    ]:
        """Query, key and value of the block's input."""
        y = self.attention_norm(x)
        layer = self.attention
        query, key, value = rotate(layer.query(y), angles), rotate(layer.key(y), angles), layer.value(y)
        return tuple(checkpoint_name(x, "projections") for x in (query, key, value))

    def finish(
        self, x: Float[Array, "batch length d"], attended: Float[Array, "batch length heads head_dim"]
    ) -> Float[Array, "batch length d"]:
        """The block's output, given its input and what attention found."""
        x = x + self.attention.out(attended)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Embeddings to hidden states to logits; the caller mixes image features in between."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.config = config
        table = 0.5 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size))
        self.embedding = nnx.Param(table, axes=("table", None))
        self.blocks = stack(lambda rngs: Block(config, rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(
            (config.hidden_size,), (config.vocab_size,), ("embed", "vocab"), bias=False, rngs=rngs
        )

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length d"]:
        """Embeddings of token ids."""
        table = constrain(self.embedding[...], ("vocab", None))
        return constrain(jnp.take(table, tokens, axis=0), ("batch", "length", None))

    def __call__(
        self,
        x: Float[Array, "batch length d"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        remat: str = "none",
    ) -> Float[Array, "batch length d"]:
        """Hidden states after the final norm, without a cache: training and scoring."""
        angles = rotary_angles(positions, self.config)

        def body(block: Block, x: Array) -> Array:
            query, key, value = block.project(x, angles)
            return block.finish(x, attention(query, key, value, causal=True, segment_ids=segment_ids))

        return self.norm(run_stack(self.blocks, x, body, remat))

    def prefill(
        self, x: Float[Array, "batch length d"]
    ) -> tuple[
        Float[Array, "batch length d"],
        Float[Array, "layers batch length kv_heads head_dim"],
        Float[Array, "layers batch length kv_heads head_dim"],
    ]:
        """Runs right-padded prompts from position 0.

        Padding is harmless: it comes after every real token, which the causal mask hides.

        Returns:
          (hidden states after the final norm, keys, values).
        """
        batch, length = x.shape[:2]
        angles = rotary_angles(jnp.broadcast_to(jnp.arange(length), (batch, length)), self.config)

        def step(x: Array, block: Block) -> tuple[Array, tuple[Array, Array]]:
            query, key, value = block.project(x, angles)
            x = block.finish(x, attention(query, key, value, causal=True))
            return constrain(x, ("batch", "length", None)), (key, value)

        x, (keys, values) = jax.lax.scan(step, x, self.blocks)
        return self.norm(x), keys, values

    def decode(
        self, x: Float[Array, "batch 1 d"], cache: KVCache, active: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch 1 d"], KVCache]:
        """Runs one new position per slot, at each slot's own length.

        Args:
          x: embeddings of the new positions.
          cache: what the slots have seen.
          active: 1 for slots in use; the others' output means nothing and their cache stays.
        """
        # A slot out of use has no length, so that nothing of it is read.
        lengths = jnp.where(active > 0, cache.lengths, 0)
        angles = rotary_angles(lengths[:, None], self.config)
        scales = None if cache.key_scale is None else (cache.key_scale, cache.value_scale)

        def step(x: Array, inputs: tuple[Array, Block]) -> tuple[Array, tuple[Array, Array]]:
            layer, block = inputs
            query, key, value = (y[:, 0] for y in block.project(x, angles))
            attended = decode_attention(
                query, key, value, cache.key, cache.value, layer, lengths, scales=scales
            )
            return block.finish(x, attended[:, None]), (key, value)

        layers = jnp.arange(self.config.num_layers)
        x, (keys, values) = jax.lax.scan(step, x, (layers, self.blocks))
        return self.norm(x), cache.append(keys, values, active)

    def branch(
        self,
        x: Float[Array, "batch branches length d"],
        keys: Float[Array, "layers batch prefix kv_heads head_dim"],
        values: Float[Array, "layers batch prefix kv_heads head_dim"],
        lengths: Int[Array, " batch"],
    ) -> Float[Array, "batch branches length d"]:
        """Runs several continuations of each prefilled prompt, which don't see each other.

        Args:
          x: embeddings of the continuations.
          keys, values: what `prefill` returned.
          lengths: of the prompts.
        """
        batch, branches, length, width = x.shape
        rows = batch * branches
        positions = jnp.repeat(lengths, branches)[:, None] + jnp.arange(length)
        angles = rotary_angles(positions, self.config)

        def step(x: Array, inputs: tuple[Block, Array, Array]) -> tuple[Array, None]:
            block, prefix_key, prefix_value = inputs
            query, key, value = (y.reshape(batch, branches, *y.shape[1:]) for y in block.project(x, angles))
            attended = branch_attention(query, key, value, prefix_key, prefix_value, lengths)
            return block.finish(x, attended.reshape(rows, *attended.shape[2:])), None

        x, _ = jax.lax.scan(step, x.reshape(rows, length, width), (self.blocks, keys, values))
        return self.norm(x).reshape(batch, branches, length, width)

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Scores over the vocabulary, in float32."""
        return self.head(hidden).astype(jnp.float32)
