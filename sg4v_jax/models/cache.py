"""Keys and values of what the decoder has seen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sg4v_jax.kernels.decoding import CACHE_AXES, parts
from sg4v_jax.models.config import TextConfig
from sg4v_jax.parallel.rules import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every slot, as rows: position after position, a row for each head.

    So they lie in memory as the kernel reads them, whatever the number of heads; and a layer is never cut
    out. Heads that a mesh splits are in several parts, each with its own rows; so are all heads where no
    kernel reads them (`kernels.decoding.parts`).

    Attributes:
      key, value: [layers, batch, parts, capacity * kv_heads / parts, head_dim], floating or int8.
      key_scale, value_scale: float32[layers, batch, parts, capacity * kv_heads / parts], what to multiply
        int8 keys and values by; None for floating ones.
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
        count = parts(config.num_kv_heads)
        rows = (config.num_layers, batch, count, capacity * config.num_kv_heads // count)
        zeros = constrain(jnp.zeros((*rows, config.head_dim), dtype), CACHE_AXES)
        quantized = jnp.dtype(dtype) == jnp.int8
        scale = constrain(jnp.zeros(rows, jnp.float32), CACHE_AXES[:4]) if quantized else None
        return cls(zeros, zeros, scale, scale, jnp.zeros(batch, jnp.int32))

    def append(
        self,
        key: Float[Array, "layers batch kv_heads head_dim"],
        value: Float[Array, "layers batch kv_heads head_dim"],
        active: Int[Array, " batch"],
    ) -> "KVCache":
        """Writes one position behind the last of each slot where `active` is 1; others stay as they are."""
        slots = jnp.arange(self.lengths.size)
        return self._write(
            key[:, :, None], value[:, :, None], slots, self.lengths, active, self.lengths + active
        )

    def insert(
        self,
        key: Float[Array, "layers rows length kv_heads head_dim"],
        value: Float[Array, "layers rows length kv_heads head_dim"],
        slots: Int[Array, " rows"],
        lengths: Int[Array, " rows"],
    ) -> "KVCache":
        """Gives `slots` whole prompts. A slot number outside the cache drops its row."""
        new_lengths = self.lengths.at[slots].set(lengths, mode="drop")
        return self._write(key, value, slots, jnp.zeros_like(slots), jnp.ones_like(slots), new_lengths)

    def take(self, slots: Int[Array, " batch"]) -> "KVCache":
        """A cache whose slots are copies of `slots`. Needs room for a second cache."""
        cut = lambda leaf: jnp.take(leaf, slots, axis=leaf.ndim > 1)  # noqa: E731
        return jax.tree.map(cut, self)

    def _write(self, key, value, slots, positions, wanted, lengths):  # type: ignore[no-untyped-def]
        """[layers, n, length, kv_heads, head_dim] to `positions` and on of `slots`, where `wanted`."""
        count, rows = self.key.shape[2:4]
        width = key.shape[3] // count
        # An index outside is not written.
        places = jnp.stack([slots, jnp.where(wanted > 0, positions * width, rows)], axis=1)

        def write(old: Array, new: Array) -> Array:
            layers, n, length, _, *rest = new.shape
            new = new.reshape(layers, n, length, count, width, *rest).swapaxes(2, 3)
            new = new.reshape(layers, n, count, length * width, *rest).astype(old.dtype)
            # Written out, for indexing makes XLA turn whole arrays around.
            numbers = jax.lax.ScatterDimensionNumbers(
                update_window_dims=(0, 2, 3, 4)[: new.ndim - 1],
                inserted_window_dims=(1,),
                scatter_dims_to_operand_dims=(1, 3),
            )
            drop = jax.lax.GatherScatterMode.FILL_OR_DROP
            return jax.lax.scatter(old, places, new, numbers, mode=drop, unique_indices=True)

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
