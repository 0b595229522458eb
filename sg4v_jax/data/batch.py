"""The one batch type, from the loader through the train step to benchmarks and plans."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sg4v_jax.parallel.rules import RULES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed multimodal samples, with static shapes.

    Attributes:
      tokens: int32[batch, length], what a position holds; 0 where an image feature goes, and in
        padding.
      targets: int32[batch, length], the token to predict at a position. Already shifted within each
        sample, so that nothing is predicted across a boundary.
      loss_weights: float32[batch, length], 1 where the prediction is supervised, else 0.
      positions: int32[batch, length], position within the sample, from 0.
      segment_ids: int32[batch, length], which sample of the row a position belongs to, from 1;
        0 is padding. Samples are blind to each other.
      images: uint8[batch, slots, height, width, 3], filled from the first slot on. A row without
        images has empty slots; the vision tower still runs, for the shapes are static.
      image_index: int32[batch, length], which of the row's `slots * num_image_tokens` features a
        position takes, -1 for text.
    """

    tokens: Int[Array | np.ndarray, "batch length"]
    targets: Int[Array | np.ndarray, "batch length"]
    loss_weights: Float[Array | np.ndarray, "batch length"]
    positions: Int[Array | np.ndarray, "batch length"]
    segment_ids: Int[Array | np.ndarray, "batch length"]
    images: UInt8[Array | np.ndarray, "batch slots height width 3"]
    image_index: Int[Array | np.ndarray, "batch length"]


def from_packed(packed: dict[str, np.ndarray]) -> Batch:
    """A batch from packed samples (see `data.packing`), as numpy arrays.

    Slots are filled in the order of the samples in a row, and features are used in the order of
    their placeholders; so the n-th placeholder of a row takes the row's n-th feature.
    """
    is_image = packed["is_image"].astype(bool)
    running = np.cumsum(is_image, axis=1, dtype=np.int32) - 1
    return Batch(
        tokens=packed["tokens"],
        targets=packed["targets"],
        loss_weights=packed["loss_weights"],
        positions=packed["tokens_positions"].astype(np.int32),
        segment_ids=packed["tokens_segment_ids"].astype(np.int32),
        images=packed["images"],
        image_index=np.where(is_image, running, np.int32(-1)),
    )


def to_devices(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Assembles global arrays from this process's rows, split over the mesh's batch axes."""

    def place(local: np.ndarray) -> Array:
        spec = jax.sharding.PartitionSpec(RULES["batch"])
        return jax.make_array_from_process_local_data(jax.sharding.NamedSharding(mesh, spec), local)

    return jax.tree.map(place, batch)
