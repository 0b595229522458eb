"""A plain folder of images as records to caption."""

import json
import os
from collections.abc import Iterator

from etils import epath

from sg4v_jax.data.records import IMAGE_PLACEHOLDER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(root: str | os.PathLike[str]) -> list[str]:
    """Paths of all images below a directory or URI, relative to it, sorted."""
    return sorted(_walk(epath.Path(root), ""))


def write_records(root: str | os.PathLike[str], file: epath.Path) -> None:
    """Writes a JSONL with a record for every image of a folder: a question still to be answered.

    Raises:
      FileNotFoundError: there is no image.
    """
    images = find_images(root)
    if not images:
        raise FileNotFoundError(f"no image below {os.fspath(root)}; expected {', '.join(IMAGE_SUFFIXES)}")
    question = [{"from": "human", "value": IMAGE_PLACEHOLDER}]
    with file.open("w") as lines:
        for name in images:
            lines.write(json.dumps({"id": name, "image": name, "conversations": question}) + "\n")


def _walk(folder: epath.Path, prefix: str) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield prefix + path.name
