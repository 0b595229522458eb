"""Packs samples of uneven length into rows of one shape: a token budget and an image budget.

A row starts with the sample that has waited longest, so none waits forever. From a window of waiting
samples it takes those that together fill it best; all combinations count, not only the greedy one.
Which rows come out depends on nothing but the samples' sizes and order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# What an empty image slot costs, in units of a row's tokens: an image lost is compute lost as well,
# but above all it is a sample with an image that waits, until images are all that is left.
_SLOT_VALUE = 0.5


def best_fit(sizes: Sequence[tuple[int, int]], length: int, image_slots: int) -> list[int]:
    """Which of the waiting samples go into the next row.

    Args:
      sizes: (tokens, images) of each, in the order they came; none larger than a row.
      length: tokens per row.
      image_slots: images per row.

    Returns:
      Their indices, rising. The first sample is always one of them.
    """
    room, slots = length - sizes[0][0], image_slots - sizes[0][1]
    if room < 0 or slots < 0:
        raise ValueError(f"a sample of {sizes[0]} tokens and images is larger than a row")
    # Bit t of sums[m]: some choice of the samples so far has t tokens and m images. One big integer
    # does for all t at once.
    full = (1 << (room + 1)) - 1
    sums = [1] + [0] * slots
    history = []
    for tokens, images in sizes[1:]:
        history.append(sums)
        if images <= slots and tokens <= room:
            kept = sums[:images] if images else []
            sums = kept + [sums[m] | (sums[m - images] << tokens) & full for m in range(images, slots + 1)]
    fills = [(reached.bit_length() - 1, m) for m, reached in enumerate(sums) if reached]
    tokens_left, images_left = max(
        fills, key=lambda fill: (fill[0] / length + _SLOT_VALUE * fill[1] / image_slots, fill)
    )
    chosen = []
    for i in range(len(sizes) - 1, 0, -1):
        before = history[i - 1]
        if before[images_left] >> tokens_left & 1:
            continue  # Reached without this sample, so by earlier ones: they have waited longer.
        chosen.append(i)
        tokens_left -= sizes[i][0]
        images_left -= sizes[i][1]
    return [0, *reversed(chosen)]


def pack(
    samples: Iterable[T],
    size: Callable[[T], tuple[int, int]],
    *,
    length: int,
    image_slots: int,
    window: int,
) -> Iterator[list[T]]:
    """Rows of a finite stream of samples.

    Args:
      samples: anything that has a size.
      size: (tokens, images) of one.
      length: tokens per row.
      image_slots: images per row.
      window: samples that wait at a time; 1 puts each sample in a row of its own.

    Yields:
      The samples of a row, in the order they came. Each sample comes out once.
    """
    waiting: list[T] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == window:
            yield take_row(waiting, size, length=length, image_slots=image_slots)
    while waiting:
        yield take_row(waiting, size, length=length, image_slots=image_slots)


def take_row(
    waiting: list[T], size: Callable[[T], tuple[int, int]], *, length: int, image_slots: int
) -> list[T]:
    """Removes the next row's samples from `waiting`; see `best_fit`."""
    chosen = best_fit([size(sample) for sample in waiting], length, image_slots)
    row = [waiting[i] for i in chosen]
    for i in reversed(chosen):
        del waiting[i]
    return row
