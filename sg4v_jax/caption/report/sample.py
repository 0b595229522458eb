"""Which captions are looked at closely, and how they are found again in their files."""

from collections.abc import Iterable

import numpy as np

from sg4v_jax.caption.report.captions import Caption, read_captions
from sg4v_jax.caption.report.measure import CaptionSet, hash_text

_GOLDEN, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def ranked(table: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """The rows in an order that depends on the seed and each image's path alone.

    So the first ones are a random sample, and the same images come first in every set that has them.

    Args:
      table: rows of `measure.COLUMNS`.
      rows: int[n], which of them.
      seed: of the order.
    """
    with np.errstate(over="ignore"):
        mixed = (table["image"][rows] ^ np.uint64(seed * _GOLDEN % 2**64)) * np.uint64(_MIX)
        mixed ^= mixed >> np.uint64(31)
    order: np.ndarray = rows[np.argsort(mixed * np.uint64(_GOLDEN), kind="stable")]
    return order


def by_source(table: np.ndarray, order: np.ndarray, each: int, most: int) -> list[int]:
    """The first rows of each source, of the most frequent sources first.

    Args:
      table: rows of `measure.COLUMNS`.
      order: int[n], the rows in order.
      each: rows of a source.
      most: rows in all.
    """
    sources, counts = np.unique(table["source"][order], return_counts=True)
    rows: list[int] = []
    for source in sources[np.argsort(-counts, kind="stable")]:
        rows += order[table["source"][order] == source][:each].tolist()
    return rows[:most]


def fetch(captions: CaptionSet, rows: Iterable[int]) -> dict[int, Caption]:
    """Reads some captions once more.

    Args:
      captions: a measured set.
      rows: of its table.

    Raises:
      ValueError: a file has changed since it was measured.
    """
    wanted = sorted(set(rows), reverse=True)
    found: dict[int, Caption] = {}
    stream = read_captions(captions.files)
    for row, caption in enumerate(stream):
        if not wanted:
            break
        if row == wanted[-1]:
            found[wanted.pop()] = caption
            if captions.table["image"][row] != hash_text(caption.image):
                break
    if wanted or any(captions.table["text"][row] != hash_text(c.text) for row, c in found.items()):
        raise ValueError(f"{', '.join(captions.files)}: changed while the report was made; run it again")
    return found
