"""Small pictures for pages: drawn anew, so that no byte of an image file gets into one."""

import io
import os

from sg4v_jax.data.image import ImageError, load_image
from sg4v_jax.data.records import resolve_image

_MAX_BYTES = 64_000_000


def thumbnail(root: str | os.PathLike[str], name: str, side: int) -> bytes:
    """A JPEG of an image below the image root, at most `side` pixels wide and high.

    Raises:
      ImageError: can't be decoded, or has too many pixels or bytes.
      RecordError: the path leaves the root.
      OSError: can't be read.
    """
    path = resolve_image(root, name)
    if (size := path.stat().length) > _MAX_BYTES:
        raise ImageError(f"{name}: {size} bytes are more than {_MAX_BYTES}; make it smaller")
    image = load_image(path.read_bytes(), name=name)
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return data.getvalue()
