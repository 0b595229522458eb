"""Keys and values of what the decoder has seen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sg4v_jax.models.config import TextConfig
from sg4v_jax.parallel.rules import constrain

CACHE_AXES = ("layers", "batch", "length", "kv_heads", "head_dim")
SCALE_AXES = ("layers", "batch", "length", "kv_heads")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every slot.

    A layer is never cut out of it: attention reads it where it lies (`kernels.decoding`), and new
    positions of all layers are written at once, after the last layer.

    Attributes:
      key, value: [layers, batch, capacity, kv_heads, head_dim], floating or int8.
      key_scale, value_scale: float32[layers, batch, capacity, kv_heads], what to multiply int8 keys and
        values by; None for floating ones.
      lengths: int32[batch], positions in use per slot.
    """

    # Not annotated as arrays: trees of shapes and of shardings have this form too.
    key: Any
    value: Any
    key_scale: Any
    value_scale: Any
    lengths: Any

    @classmethod
    def empty(cls, config: TextConfig, batch: int, capacity: int, dtype: jnp.dtype | str) -> "KVCache":
        """A cache with no position in use. `dtype` int8 keeps a scale per position and head."""
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        zeros = constrain(jnp.zeros(shape, dtype), CACHE_AXES)
        quantized = jnp.dtype(dtype) == jnp.int8
        scale = constrain(jnp.zeros(shape[:-1], jnp.float32), SCALE_AXES) if quantized else None
        return cls(zeros, zeros, scale, scale, jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        return int(self.key.shape[2])

    def append(
        self,
        key: Float[Array, "layers batch kv_heads head_dim"],
        value: Float[Array, "layers batch kv_heads head_dim"],
        active: Int[Array, " batch"],
    ) -> "KVCache":
        """Writes one position behind the last of each slot where `active` is 1; others stay as they are."""
        rows = jnp.arange(self.lengths.size)
        # An index outside is not written.
        at = jnp.where(active > 0, self.lengths, self.capacity)
        write = lambda old, new: old.at[:, rows, at].set(new.astype(old.dtype), mode="drop")  # noqa: E731
        return self._written(write, key, value, self.lengths + active)

    def insert(
        self,
        key: Float[Array, "layers rows length kv_heads head_dim"],
        value: Float[Array, "layers rows length kv_heads head_dim"],
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
    ) -> "KVCache":
        """Gives `slots` whole prompts. A slot number outside the cache drops its row."""
        count = key.shape[2]
        write = lambda old, new: old.at[:, slots, :count].set(new.astype(old.dtype), mode="drop")  # noqa: E731
        return self._written(write, key, value, self.lengths.at[slots].set(lengths, mode="drop"))

    def take(self, slots: Int[Array, " batch"]) -> "KVCache":
        """A cache whose slots are copies of `slots`. Needs room for a second cache."""
        cut = lambda leaf: jnp.take(leaf, slots, axis=leaf.ndim > 1)  # noqa: E731
        return jax.tree.map(cut, self)

    def _written(self, write, key, value, lengths):  # type: ignore[no-untyped-def]
        if self.key_scale is None:
            return KVCache(write(self.key, key), write(self.value, value), None, None, lengths)
        (key, key_scale), (value, value_scale) = quantize(key), quantize(value)
        return KVCache(
            write(self.key, key),
            write(self.value, value),
            write(self.key_scale, key_scale),
            write(self.value_scale, value_scale),
            lengths,
        )


def quantize(x: Float[Array, "*shape n"]) -> tuple[Int[Array, "*shape n"], Float[Array, " *shape"]]:
    """int8 values and float32 scales over the last axis: x = values * scale, to within scale / 2."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1), jnp.finfo(jnp.float32).tiny) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale
