"""Packing loses nothing, mixes nothing up and keeps its budgets."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_jax.data.batch import Batch
from tests.tiny import packed

LENGTH, SLOTS, FEATURES, SIZE = 24, 3, 4, 2

# What matters of a sample: how many images it has and how many text tokens.
SAMPLES = st.lists(
    st.tuples(st.integers(0, SLOTS), st.integers(1, LENGTH - SLOTS * FEATURES)), min_size=1, max_size=14
)


def make(shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Samples whose tokens carry the sample's number, and whose images carry theirs."""
    samples, image = [], 0
    for number, (images, text) in enumerate(shapes):
        is_image = np.array([0] + [1] * images * FEATURES + [0] * (text - 1), np.int32)
        tokens = np.where(is_image, 0, 100 * (number + 1) + np.arange(len(is_image))).astype(np.int32)
        pixels = np.zeros((images, SIZE, SIZE, 3), np.uint8)
        for slot in range(images):
            image += 1
            pixels[slot] = image
        samples.append(
            {
                "tokens": tokens,
                "targets": np.append(tokens[1:], 0).astype(np.int32),
                "loss_weights": (np.arange(len(tokens)) % 2).astype(np.float32),
                "is_image": is_image,
                "images": pixels,
            }
        )
    return samples


def contents(batch: Batch) -> list[dict[str, Any]]:
    """Every sample found in a batch, with the pixel each of its image features comes from."""
    found = []
    for row in range(batch.tokens.shape[0]):
        segments = batch.segment_ids[row]
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            index = batch.image_index[row, at]
            # The slot of a feature, then the number that fills that slot's image.
            values = [int(batch.images[row, i // FEATURES, 0, 0, 0]) for i in index[index >= 0]]
            found.append({"at": at, "row": row, "index": index, "image_values": values})
    return found


@settings(deadline=None, max_examples=40)
@given(SAMPLES, st.booleans())
def test_every_sample_comes_out_once_and_whole(shapes: list[tuple[int, int]], packing: bool) -> None:
    samples = make(shapes)
    batch = packed(samples, length=LENGTH, slots=SLOTS, packing=packing)
    assert batch.tokens.shape[1:] == (LENGTH,)
    assert batch.images.shape[1:] == (SLOTS, SIZE, SIZE, 3)
    found = contents(batch)
    assert len(found) == len(samples)
    remaining = list(range(len(samples)))
    for piece in found:
        row, at = piece["row"], piece["at"]
        assert np.array_equal(at, np.arange(at[0], at[0] + len(at))), "a sample is in one piece"
        # Its first token is text, and says which sample it is.
        number = int(batch.tokens[row, at[0]]) // 100 - 1
        remaining.remove(number)
        sample = samples[number]
        for name in ("tokens", "targets", "loss_weights"):
            np.testing.assert_array_equal(getattr(batch, name)[row, at], sample[name])
        np.testing.assert_array_equal(batch.positions[row, at], np.arange(len(at)))
        np.testing.assert_array_equal(piece["index"] >= 0, sample["is_image"] > 0)
        expected = np.repeat(sample["images"][:, 0, 0, 0], FEATURES)
        np.testing.assert_array_equal(piece["image_values"], expected)
    assert not remaining
    if not packing:
        assert batch.segment_ids.max() == 1


@settings(deadline=None, max_examples=40)
@given(SAMPLES)
def test_padding_is_empty(shapes: list[tuple[int, int]]) -> None:
    batch = packed(make(shapes), length=LENGTH, slots=SLOTS)
    padding = batch.segment_ids == 0
    for name, empty in (("tokens", 0), ("targets", 0), ("loss_weights", 0), ("image_index", -1)):
        assert (getattr(batch, name)[padding] == empty).all()
    # Segments count up from 1 without a gap, and padding comes last.
    for row in batch.segment_ids:
        used = row[row > 0]
        assert np.array_equal(row[: len(used)], used)
        assert set(np.diff(used)) <= {0, 1} and used[0] == 1
    assert batch.image_index.max() < SLOTS * FEATURES


def test_types_are_those_of_the_batch() -> None:
    batch = packed(make([(1, 5), (0, 3)]), length=LENGTH, slots=SLOTS)
    kinds = {name: str(value.dtype) for name, value in vars(batch).items()}
    assert kinds.pop("images") == "uint8"
    assert kinds.pop("loss_weights") == "float32"
    assert set(kinds.values()) == {"int32"}


def test_packing_uses_the_room() -> None:
    """The image budget alone can fill a row, as can the token budget."""
    assert packed(make([(0, 8)] * 6), length=LENGTH, slots=SLOTS).tokens.shape[0] == 2
    assert packed(make([(2, 2)] * 4), length=100, slots=SLOTS).tokens.shape[0] == 4
    assert packed(make([(1, 2), (2, 2), (0, 12)]), length=LENGTH + 4, slots=SLOTS).tokens.shape[0] == 1


def test_text_only_rows_have_empty_slots() -> None:
    batch = packed(make([(0, 8), (0, 8)]), length=LENGTH, slots=SLOTS)
    assert batch.images.shape == (1, SLOTS, SIZE, SIZE, 3)
    assert not batch.images.any()
    assert (batch.image_index == -1).all()
