"""Corpora of images: a folder, a list of paths; archives and datasets are in `archives.py`.

A corpus is a fixed order of images. Opening one reads names, never images, so that millions of images
take no more memory than their names.
"""

import abc
import dataclasses
import hashlib
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

from sg4v_jax.data.defects import inspect_image
from sg4v_jax.data.folder import find_images, require_folder
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.json_stream import read_entries
from sg4v_jax.data.records import RecordError, image_names, resolve_image

FORMATS = ("auto", "folder", "list", "dataset", "tar", "parquet")
MAX_IMAGE_BYTES = 50_000_000
_LISTS = (".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image that has not been read yet.

    Attributes:
      name: what the captions call it: its path relative to the image root.
      size: in bytes.
      read: its encoded bytes.
    """

    name: str
    size: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class CorpusImage:
    """An image file, or why there is none.

    Attributes:
      name: see `Entry`.
      data: its encoded bytes.
      sha256: of these bytes; "" without them.
      kind: what is wrong with it, one of `data.defects.KINDS`; "" if nothing is.
      error: the same in words.
    """

    name: str
    data: bytes = b""
    sha256: str = ""
    kind: str = ""
    error: str = ""


class Corpus(abc.ABC):
    """Images in a fixed order.

    Attributes:
      source: where it is, for messages.
      sha256: of what decides which images there are and their order; not of the images themselves.
    """

    source: str
    sha256: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images."""

    def name(self, index: int) -> str:
        """What to call an image that can't be read."""
        return f"image {index}"

    @abc.abstractmethod
    def entry(self, index: int) -> Entry:
        """The image of a number.

        Raises:
          RecordError, ImageError, OSError: there is none.
        """

    def read(self, index: int, max_bytes: int = MAX_IMAGE_BYTES) -> CorpusImage:
        """Reads an image; looks at its header, and leaves decoding to who needs the pixels."""
        name = self.name(index)
        try:
            entry = self.entry(index)
            name = entry.name
            if entry.size > max_bytes:
                message = f"{name}: {entry.size} bytes, more than --max-image-bytes {max_bytes}"
                return CorpusImage(name, kind="huge_image", error=message)
            data = entry.read()
            inspect_image(data, name, decode=False)
            return CorpusImage(name, data, hashlib.sha256(data).hexdigest())
        except (ImageError, RecordError) as error:
            return CorpusImage(name, kind=getattr(error, "kind", "unreadable_image"), error=str(error))
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            message = f"{name}: can't be read from {self.source}: {error.strerror or error}"
            return CorpusImage(name, kind="missing_image" if missing else "unreadable_image", error=message)


class Files(Corpus):
    """Image files below a root; paths that leave it are bad images."""

    def __init__(self, source: str, root: str | os.PathLike[str], names: Iterable[str]):
        self.source, self._root = source, root
        # The same image twice would be the same caption twice.
        self._names = tuple(dict.fromkeys(names))
        self.sha256 = names_sha256(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def entry(self, index: int) -> Entry:
        name = self._names[index]
        path = resolve_image(self._root, name)
        if "://" in os.fspath(path):
            return Entry(name, path.stat().length, path.read_bytes)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # Reading a pipe would wait for ever.
            raise ImageError(f"{name}: no file, but a directory, pipe or device")
        return Entry(name, status.st_size, path.read_bytes)


def open_corpus(
    source: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    form: str = "auto",
) -> Corpus:
    """Opens a corpus.

    Args:
      source: a folder of images (searched), of webdataset tars or of Parquet files; one such file; a
        dataset of `sg4v data build`; a JSON list of paths (the original tool's input) or of
        LLaVA-format records.
      image_root: what the paths of a list are relative to; its own folder by default.
      form: one of `FORMATS`; `auto` looks.

    Raises:
      ValueError: not a known form, damaged, or without images.
      OSError: it can't be read.
    """
    from sg4v_jax.caption.corpus import archives

    source = os.fspath(source)
    if form not in FORMATS:
        raise ValueError(f"input format {form!r} is not one of {', '.join(FORMATS)}")
    form = _form_of(source) if form == "auto" else form
    if image_root is not None and form not in ("folder", "list"):
        raise ValueError(f"{source}: an image root goes with a list of paths, not with a {form}")
    corpus: Corpus
    if form == "tar":
        corpus = archives.Tars(source, _files(source, ".tar"))
    elif form == "parquet":
        corpus = archives.Parquet(source, _files(source, ".parquet"))
    elif form == "dataset":
        corpus = archives.Dataset(source)
    else:
        root = image_root or (source if form == "folder" else os.path.dirname(source) or ".")
        corpus = Files(source, root, list_images(source))
    if not len(corpus):
        raise ValueError(f"{source}: no images in this {form}")
    return corpus


def list_images(source: str | os.PathLike[str]) -> list[str]:
    """Paths of a folder's images, whatever else is in it, or those that a JSON or JSONL list holds.

    Raises:
      ValueError: an entry is neither a path nor a record with one image, or the file is damaged.
      OSError: it can't be read.
    """
    text = os.fspath(source)
    if os.path.isdir(text) or ("://" in text and not text.endswith(_LISTS)):
        require_folder(source)
        return find_images(source)
    return list(_listed(source))


def names_sha256(names: Iterable[object]) -> str:
    """Digest of what there is, in its order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(str(name).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _listed(source: str | os.PathLike[str]) -> Iterator[str]:
    for entry in read_entries(source):
        if entry.error:
            raise entry.error
        names = (entry.value,) if isinstance(entry.value, str) else image_names(entry.value)
        if len(names) != 1:
            raise ValueError(
                f"{os.fspath(source)}: {entry.position}: expected an image path, or a record with one image; "
                f"found {ascii(entry.value)[:60]}"
            )
        yield names[0]


def _form_of(source: str) -> str:
    if "://" in source:
        return "list" if source.endswith(_LISTS) else "folder"
    if not os.path.isdir(source):
        if not os.path.exists(source):
            raise FileNotFoundError(f"{source}: no such file or folder")
        return {".tar": "tar", ".parquet": "parquet"}.get(pathlib.Path(source).suffix, "list")
    inside = os.listdir(source)
    if "dataset_info.json" in inside:
        return "dataset"
    forms = {form for form in ("tar", "parquet") if any(name.endswith(f".{form}") for name in inside)}
    if len(forms) > 1:
        raise ValueError(f"{source}: holds both tars and Parquet files; say which with --input-format")
    return forms.pop() if forms else "folder"


def _files(source: str, suffix: str) -> Sequence[pathlib.Path]:
    path = pathlib.Path(source)
    return sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path]
