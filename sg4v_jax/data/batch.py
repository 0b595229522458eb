"""The one batch type, from the loader through the train step to benchmarks and plans."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sg4v_jax.parallel.rules import RULES

MODALITIES = ("text", "image")


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
      kinds: int32[batch, length], the kind of sample a position belongs to, so that losses can be told
        apart however samples are packed: `2 * source + 1` if it has an image, else `2 * source`, where
        sources are numbered in alphabetical order. See `kind_names`.
    """

    tokens: Int[Array | np.ndarray, "batch length"]
    targets: Int[Array | np.ndarray, "batch length"]
    loss_weights: Float[Array | np.ndarray, "batch length"]
    positions: Int[Array | np.ndarray, "batch length"]
    segment_ids: Int[Array | np.ndarray, "batch length"]
    images: UInt8[Array | np.ndarray, "batch slots height width 3"]
    image_index: Int[Array | np.ndarray, "batch length"]
    kinds: Int[Array | np.ndarray, "batch length"]


def kind_names(sources: Iterable[str]) -> list[tuple[str, str]]:
    """(source, modality) of each of `Batch.kinds`."""
    return [(source, modality) for source in sorted(sources) for modality in MODALITIES]


def from_rows(
    rows: Sequence[Sequence[Mapping[str, np.ndarray]]], length: int, image_slots: int, image_size: int
) -> Batch:
    """A batch of numpy arrays, from the samples of each row.

    Args:
      rows: samples as from `data.sample.make_sample`, which fit into a row together; a row without any is
        padding. `source` is the number of a sample's source, 0 if it isn't there.
      length: tokens per row.
      image_slots: images per row.
      image_size: their side in pixels.
    """
    shape = (len(rows), length)
    tokens, targets, positions, segment_ids, kinds = (np.zeros(shape, np.int32) for _ in range(5))
    loss_weights, is_image = np.zeros(shape, np.float32), np.zeros(shape, bool)
    images = np.zeros((len(rows), image_slots, image_size, image_size, 3), np.uint8)
    for r, row in enumerate(rows):
        start = slot = 0
        for segment, sample in enumerate(row, start=1):
            end = start + len(sample["tokens"])
            tokens[r, start:end] = sample["tokens"]
            targets[r, start:end] = sample["targets"]
            loss_weights[r, start:end] = sample["loss_weights"]
            is_image[r, start:end] = sample["is_image"]
            positions[r, start:end] = np.arange(end - start)
            segment_ids[r, start:end] = segment
            kinds[r, start:end] = 2 * sample.get("source", 0) + (len(sample["images"]) > 0)
            images[r, slot : slot + len(sample["images"])] = sample["images"]
            start, slot = end, slot + len(sample["images"])
    # Slots are filled in the order of the samples, and each image has all of its placeholders; so the
    # n-th placeholder of a row takes the row's n-th feature.
    running = np.cumsum(is_image, axis=1, dtype=np.int32) - 1
    image_index = np.where(is_image, running, np.int32(-1))
    return Batch(tokens, targets, loss_weights, positions, segment_ids, images, image_index, kinds)


def to_devices(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Assembles global arrays from this process's rows, split over the mesh's batch axes."""

    def place(local: np.ndarray) -> Array:
        spec = jax.sharding.PartitionSpec(RULES["batch"])
        return jax.make_array_from_process_local_data(jax.sharding.NamedSharding(mesh, spec), local)

    return jax.tree.map(place, batch)
