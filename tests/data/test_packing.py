"""Packing loses nothing, mixes nothing up and keeps its budgets."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import STAGES, measure
from sg4v_jax import config as configs
from sg4v_jax.data.batch import Batch
from sg4v_jax.data.packing import best_fit, pack
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


# What waits: (tokens, images).
SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=9)


@settings(deadline=None, max_examples=300)
@given(SIZES)
def test_no_other_choice_fills_the_row_better(sizes: list[tuple[int, int]]) -> None:
    """Of all choices that hold the first sample, by tokens and images."""
    length, slots = 20, 3

    def value(choice: tuple[int, ...]) -> float:
        tokens, images = (sum(sizes[i][k] for i in choice) for k in (0, 1))
        return tokens / length + 0.5 * images / slots if tokens <= length and images <= slots else -1

    rest = range(1, len(sizes))
    choices = [(0, *more) for n in range(len(sizes)) for more in itertools.combinations(rest, n)]
    chosen = tuple(best_fit(sizes, length, slots))
    assert list(chosen) == sorted(set(chosen))
    assert value(chosen) == pytest.approx(max(map(value, choices)))


@settings(deadline=None, max_examples=100)
@given(SIZES, st.integers(1, 6))
def test_rows_lose_nothing_and_keep_nobody_waiting(sizes: list[tuple[int, int]], window: int) -> None:
    numbered = list(enumerate(sizes))
    rows = list(pack(numbered, lambda sample: sample[1], length=20, image_slots=3, window=window))
    assert sorted(sample for row in rows for sample in row) == numbered
    for row in rows:
        assert sum(tokens for _, (tokens, _) in row) <= 20
        assert sum(images for _, (_, images) in row) <= 3
    if window == 1:
        assert [row[0] for row in rows] == numbered
    # The sample that has waited longest is in every row.
    for i, row in enumerate(rows):
        assert row[0] == min(sample for later in rows[i:] for sample in later)


def test_a_sample_larger_than_a_row_is_an_error() -> None:
    for size in ((21, 0), (1, 4)):
        with pytest.raises(ValueError, match="is larger than a row"):
            best_fit([size, (1, 0)], 20, 3)


@pytest.mark.parametrize("name", STAGES)
def test_rows_of_real_lengths_are_full(name: str) -> None:
    """Lengths rebuilt from the paper's figures (benchmarks/packing.py), in the rows of each 7B config."""
    data = configs.load(f"configs/{name}.py:7b").data
    sizes = STAGES[name][0](np.random.default_rng(3), 3000)
    rows = list(
        pack(
            sizes,
            lambda size: size,
            length=data.seq_len,
            image_slots=data.image_slots,
            window=data.packing_window,
        )
    )
    fill = measure(rows, data.seq_len, data.image_slots, 0.0, data.packing_window)
    assert fill.tokens >= 0.97
    assert fill.empty_slots <= 0.08
