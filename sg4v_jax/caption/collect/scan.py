"""Reads every image once before anything is asked: hash, size, and whether it can be decoded at all."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sg4v_jax.caption.collect.journal import Journal
from sg4v_jax.data.image import ImageError, load_image
from sg4v_jax.data.records import RecordError, resolve_image

SCAN = "images.jsonl"
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ScannedImage:
    """An image file, or why it can't be used.

    Attributes:
      path: relative to the image root.
      sha256: of its bytes; "" if it can't be used.
      width: in pixels.
      height: in pixels.
      error: why it can't be used; "" if it can.
    """

    path: str
    sha256: str = ""
    width: int = 0
    height: int = 0
    error: str = ""


def scan(
    images: Sequence[str],
    root: str | os.PathLike[str],
    output: pathlib.Path,
    *,
    max_bytes: int,
    max_bad: int,
    progress: Callable[..., Iterable[Any]],
) -> list[ScannedImage]:
    """Scans images; files that did not change since the last scan are not read again.

    Args:
      images: paths relative to `root`; one that leaves it is a bad image.
      root: where they are.
      output: directory of the scan's own record.
      max_bytes: largest file that is used.
      max_bad: more images that can't be used than this are an error.
      progress: wraps the iteration over chunks of images.

    Raises:
      ImageError: too many images can't be used; the message has the first reasons.
    """
    journal = Journal(output / SCAN)
    known = {entry["path"]: entry for _, entry in journal.entries()}
    scanned: list[ScannedImage] = []
    bad: list[str] = []
    task = functools.partial(_scan_one, root=root, known=known, max_bytes=max_bytes)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for chunk in progress([images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]):
            found = list(pool.map(task, chunk))
            journal.append(*(entry for _, entry in found if entry))
            scanned += [image for image, _ in found]
            bad += [image.error for image, _ in found if image.error]
            if len(bad) > max_bad:
                raise ImageError(
                    f"{len(bad)} images can't be used, more than --max-bad-images {max_bad}; "
                    f"nothing was asked. The first: {'; '.join(bad[:3])}"
                )
    journal.close()
    return scanned


def read_image(root: str | os.PathLike[str], image: str, sha256: str) -> bytes:
    """The bytes of a scanned image.

    Raises:
      ImageError: gone, or not what it was when it was scanned.
    """
    try:
        data = resolve_image(root, image).read_bytes()
    except OSError as error:
        raise ImageError(f"{image}: can't be read below {root}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(f"{image}: changed while it was used; run the command again")
    return data


def _scan_one(
    path: str, *, root: str | os.PathLike[str], known: dict[str, Any], max_bytes: int
) -> tuple[ScannedImage, dict[str, Any] | None]:
    """(the image, what to remember of it)."""
    try:
        file = resolve_image(root, path)
        status = os.stat(file)
        if status.st_size > max_bytes:
            raise ImageError(f"{path}: {status.st_size} bytes, more than --max-image-bytes {max_bytes}")
        entry = known.get(path)
        if entry and (entry["size"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            return ScannedImage(path, entry["sha256"], entry["width"], entry["height"]), None
        data = file.read_bytes()
        width, height = load_image(data, name=path).size
    except (ImageError, RecordError) as error:
        return ScannedImage(path, error=str(error)), None
    except OSError as error:
        return ScannedImage(path, error=f"{path}: can't be read below {root}: {error.strerror}"), None
    image = ScannedImage(path, hashlib.sha256(data).hexdigest(), width, height)
    entry = {
        "path": path,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": image.sha256,
        "width": width,
        "height": height,
    }
    return image, entry
