"""Images of tars, Parquet files and datasets as files: `sg4v data build` reads them under the same names."""

import collections
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from sg4v_jax import atomic
from sg4v_jax.caption.corpus.inputs import MAX_IMAGE_BYTES, Corpus
from sg4v_jax.data.defects import allowed_bad
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import resolve_image

WRITTEN, THERE = "written", "there already"


def unpack(
    corpus: Corpus,
    output: str | os.PathLike[str],
    *,
    max_failed: str = "5%",
    max_image_bytes: int = MAX_IMAGE_BYTES,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Counter[str]:
    """Writes every image of a corpus below a folder, under the name that captions call it.

    Files appear whole, and those that are there are left alone, so that a second call goes on.

    Args:
      corpus: the images.
      output: the folder, for nothing but these; made if it isn't there.
      max_failed: images that may be bad, a number or a percentage.
      max_image_bytes: larger ones are bad.
      progress: wraps the iteration over images.

    Returns:
      Counts: `WRITTEN`, `THERE`, and bad images by kind (`data.defects.KINDS`).

    Raises:
      ImageError: more images are bad than allowed.
      ValueError: two images have one name, or the folder holds another one of that name.
      OSError: an image can't be written.
    """
    root, allowed = pathlib.Path(output), allowed_bad(max_failed, len(corpus))
    root.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = collections.Counter()
    bad = 0
    for index in progress(range(len(corpus))):
        image = corpus.read(index, max_image_bytes)
        if image.error:
            bad += 1
            counts[image.kind] += 1
            if bad > allowed:
                raise ImageError(
                    f"{bad} of {len(corpus)} images are bad, more than --max-failed {max_failed} allows; the "
                    f"last: {image.error}"
                )
            continue
        path = pathlib.Path(resolve_image(root, image.name))
        if path.exists():
            if path.read_bytes() != image.data:
                raise ValueError(
                    f"{path} is another image than {corpus.source} has of this name; names must differ, and "
                    "the folder be a new one"
                )
            counts[THERE] += 1
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, image.data)
        counts[WRITTEN] += 1
    return counts
