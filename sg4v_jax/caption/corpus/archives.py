"""Corpora whose images are inside other files: tars, Parquet files, built datasets. Nothing is unpacked."""

import array
import bisect
import functools
import os
import pathlib
import tarfile
from collections.abc import Sequence
from typing import Any

from sg4v_jax.caption.corpus.inputs import Corpus, Entry, names_sha256
from sg4v_jax.data.folder import IMAGE_SUFFIXES
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import RecordError, resolve_image

# Columns that hold images, in Parquet files of the wild: bytes, or a struct with bytes and path.
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "image_bytes", "bytes")
NAME_COLUMNS = ("path", "image_path", "file_name", "filename", "name", "key", "__key__", "id")


class Tars(Corpus):
    """Images in tars, such as webdataset's. Named TAR/MEMBER, where unpacking each tar into a folder of its
    own would put them.
    """

    def __init__(self, source: str, files: Sequence[pathlib.Path]):
        self.source, self._files = source, files
        self._names: list[str] = []
        # Beside each name: which tar, where its bytes start, how many; -1 for a link, hole or device.
        self._tar, self._offset, self._size = array.array("l"), array.array("q"), array.array("q")
        for number, file in enumerate(files):
            self._index(number, file)
        self.sha256 = names_sha256(
            part for pair in zip(self._names, self._size, strict=True) for part in pair
        )

    def _index(self, number: int, file: pathlib.Path) -> None:
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    # Headers of all members would be kept, of millions.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.isdir() or not member.name.lower().endswith(IMAGE_SUFFIXES):
                        continue
                    plain = member.isreg() and not member.issparse()
                    self._names.append(f"{file.name.removesuffix('.tar')}/{member.name.removeprefix('./')}")
                    self._tar.append(number)
                    self._offset.append(member.offset_data)
                    self._size.append(member.size if plain else -1)
        except tarfile.TarError as error:
            raise ValueError(
                f"{file}: no tar, or damaged or cut off ({error}); fetch it again, or decompress it"
            ) from error

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def entry(self, index: int) -> Entry:
        name, file, size = self._names[index], self._files[self._tar[index]], self._size[index]
        return Entry(name, size, functools.partial(self._read, name, file, self._offset[index], size))

    def _read(self, name: str, file: pathlib.Path, offset: int, size: int) -> bytes:
        _check_name(name)
        if size < 0:
            raise ImageError(f"{name}: a link or device in the tar, not a file")
        with file.open("rb") as tar:
            tar.seek(offset)
            data = tar.read(size)
        if len(data) < size:
            raise ImageError(f"{name}: {file} is cut off; fetch it again")
        return data


class Parquet(Corpus):
    """Images in Parquet files: a column of bytes, or of structs with `bytes`, and one of names."""

    def __init__(self, source: str, files: Sequence[pathlib.Path]):
        import pyarrow.parquet

        self.source, self._files = source, files
        # The first row of each row group, and where that is.
        self._starts, self._groups = array.array("q"), [(0, 0)] * 0
        self._image, self._name = "", ""
        rows = 0
        seen: list[object] = []
        for number, file in enumerate(files):
            try:
                parquet = pyarrow.parquet.ParquetFile(file)
            except pyarrow.ArrowException as error:
                raise ValueError(f"{file}: no Parquet file, or damaged ({error}); fetch it again") from error
            with parquet:
                columns = (_column(IMAGE_COLUMNS, parquet, file), _column(NAME_COLUMNS, parquet, file, ""))
                if number and columns != (self._image, self._name):
                    raise ValueError(f"{file}: its columns are not those of {files[0]}")
                self._image, self._name = columns
                for group in range(parquet.num_row_groups):
                    self._starts.append(rows)
                    self._groups.append((number, group))
                    rows += parquet.metadata.row_group(group).num_rows
            seen += [file.name, rows, os.path.getsize(file)]
        self._rows, self.sha256 = rows, names_sha256(seen)
        # Neighbours are read together, also by threads that read a little ahead.
        self._group = functools.lru_cache(maxsize=2)(self._read_group)

    def __len__(self) -> int:
        return self._rows

    def entry(self, index: int) -> Entry:
        at = bisect.bisect_right(self._starts, index) - 1
        row = self._group(at).slice(index - self._starts[at], 1).to_pylist()[0]
        image = row[self._image]
        path = image.get("path") if isinstance(image, dict) else None
        data = image.get("bytes") if isinstance(image, dict) else image
        given = (row[self._name] if self._name else None) or path
        file = self._files[self._groups[at][0]]
        name = str(given) if given else f"{file.stem}/{index - self._first_row(at)}"
        _check_name(name)
        if not isinstance(data, bytes):
            raise ImageError(f"{name}: no bytes in column {self._image!r} of {file}")
        return Entry(name, len(data), lambda: data)

    def _first_row(self, at: int) -> int:
        """The corpus's row that a row group's file begins with."""
        return self._starts[at - self._groups[at][1]]

    def _read_group(self, at: int) -> Any:
        import pyarrow.parquet

        file, group = self._groups[at]
        columns = list(dict.fromkeys(filter(None, (self._image, self._name))))
        with pyarrow.parquet.ParquetFile(self._files[file]) as parquet:
            return parquet.read_row_group(group, columns=columns)


class Dataset(Corpus):
    """The records of a dataset of `sg4v data build` that have one image; their conversations don't count."""

    def __init__(self, source: str):
        from sg4v_jax.data.build import open_dataset

        self.source, self._examples = source, open_dataset(source)
        directory = pathlib.Path(source)
        report = directory / "build_report.json"
        said = report if report.exists() else directory / "dataset_info.json"
        self.sha256 = names_sha256([said.read_text(), len(self._examples)])

    def __len__(self) -> int:
        return len(self._examples)

    def entry(self, index: int) -> Entry:
        from sg4v_jax.data.build import decode_example

        record, images = decode_example(self._examples[index], self.source, index, answered=False)
        if len(images) != 1:
            raise RecordError(f"record {index} (id {record.id!r}): {len(images)} images, one is needed")
        return Entry(record.images[0], len(images[0]), lambda: images[0])


def _check_name(name: str) -> None:
    """Captions name images relative to a root, so names that leave it are refused here already."""
    resolve_image(os.sep, name)


def _column(known: Sequence[str], parquet: Any, file: pathlib.Path, default: str | None = None) -> str:
    columns = parquet.schema_arrow.names
    found = next((name for name in known if name in columns), default)
    if found is None:
        raise ValueError(f"{file}: no column {' or '.join(known)}; it has {', '.join(columns)}")
    return found
