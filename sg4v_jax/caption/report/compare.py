"""Two sets of captions on the images that both have."""

import dataclasses

import numpy as np

from sg4v_jax.caption.report.measure import FLAGS, CaptionSet
from sg4v_jax.caption.report.phrases import KINDS

_INTERVAL = 1.96  # standard errors of a 95 % interval
LENGTHS = ("characters", "words", "sentences")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a number differs, image by image.

    Attributes:
      name: of the number.
      first: its mean in the first set.
      second: its mean in the second set.
      difference: the mean of second minus first.
      half_width: of the difference's 95 % interval; images count as independent.
      more: share of images where the second has more.
      fewer: share of images where the second has less.
    """

    name: str
    first: float
    second: float
    difference: float
    half_width: float
    more: float
    fewer: float


def common_rows(first: CaptionSet, second: CaptionSet) -> tuple[np.ndarray, np.ndarray]:
    """(int[n], int[n]): the rows of the images that both sets have; of several captions the first."""
    rows = first.first_of_image(), second.first_of_image()
    images = first.table["image"][rows[0]], second.table["image"][rows[1]]
    _, in_first, in_second = np.intersect1d(images[0], images[1], assume_unique=True, return_indices=True)
    return rows[0][in_first], rows[1][in_second]


def differences(
    first: CaptionSet, second: CaptionSet, rows: tuple[np.ndarray, np.ndarray]
) -> list[Difference]:
    """Paired differences of every number; none without common images.

    Args:
      first: a set.
      second: another set.
      rows: `common_rows` of them.
    """
    if not len(rows[0]):
        return []
    tables = first.table[rows[0]], second.table[rows[1]]
    found = [_difference(name, *(table[name] for table in tables)) for name in LENGTHS]
    repeated = [table["repeated"] / np.maximum(1, table["trigrams"]) for table in tables]
    found.append(_difference("repeated trigrams", *repeated))
    return found + [_difference(name, *(table[name] for table in tables)) for name in (*KINDS, *FLAGS)]


def _difference(name: str, first: np.ndarray, second: np.ndarray) -> Difference:
    a, b = first.astype(np.float64), second.astype(np.float64)
    gain = b - a
    error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
    return Difference(
        name,
        float(a.mean()),
        float(b.mean()),
        float(gain.mean()),
        float(_INTERVAL * error),
        float((gain > 0).mean()),
        float((gain < 0).mean()),
    )
