"""The image root: whether it is there, and all its images as records to caption."""

import json
import os

from etils import epath

from sg4v_jax.data.records import IMAGE_PLACEHOLDER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def require_folder(root: str | os.PathLike[str]) -> None:
    """Makes sure that an image root is there.

    Raises:
      FileNotFoundError: it isn't.
    """
    if not epath.Path(root).is_dir():
        raise FileNotFoundError(f"{os.fspath(root)}: no such image folder; `image` paths are relative to it")


def find_images(root: str | os.PathLike[str]) -> list[str]:
    """Paths of all images below a directory or URI, relative to it, sorted.

    Raises:
      OSError: a directory can't be read.
    """
    found, top = [], None
    for folder, _, files in epath.Path(root).walk(on_error=_fail):
        # File systems differ in how they spell the folder that they were asked for; it comes first.
        top = top or folder
        names = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES))
        found += [(folder / name).relative_to(top).as_posix() for name in names]
    return sorted(found)


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


def _fail(error: OSError) -> None:
    raise error
