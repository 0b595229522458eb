"""LLaVA-format JSON and image files to a TFDS dataset of array_record shards.

Images are stored as the verbatim bytes of their files, so building decides nothing about decoding;
text-only records store none.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sg4v_jax.data.image import ImageError, load_image
from sg4v_jax.data.records import Record, RecordError, parse_record, read_records, resolve_image, to_json

BAD_RECORD_POLICIES = ("fail", "drop")


@dataclasses.dataclass
class BuildReport:
    """What a build did.

    Attributes:
      written: records stored.
      dropped: records left out, by kind of error.
      examples: the first error message of each kind.
    """

    written: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def drop(self, error: Exception) -> None:
        kind = type(error).__name__
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        self.examples.setdefault(kind, str(error))


@dataclasses.dataclass(kw_only=True)
class LlavaConfig(tfds.core.BuilderConfig):
    """Where a dataset comes from.

    Attributes:
      json_file: JSON array or JSONL of LLaVA records (spec 1.2).
      image_root: directory that `image` paths are relative to.
      bad_records: `fail`, or `drop` (counted in the report).
    """

    json_file: str = ""
    image_root: str = ""
    bad_records: str = "fail"
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
    report: BuildReport = dataclasses.field(default_factory=BuildReport)


class Llava(tfds.core.GeneratorBasedBuilder):
    """Records of a LLaVA-format file with their images."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Images are read in place; see docs/data.md for where each comes from."

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Tensor(shape=(), dtype=np.str_)
        # TFDS has no optional image, and would decode: plain bytes stay verbatim.
        features = {"record": text, "images": tfds.features.Sequence(text)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self.builder_config
        for index, obj in enumerate(config.progress(read_records(config.json_file))):
            try:
                record = parse_record(obj, source=config.json_file, index=index)
                images = [_read_image(config.image_root, name) for name in record.images]
            except (RecordError, ImageError) as error:
                if config.bad_records == "fail":
                    raise
                config.report.drop(error)
                continue
            config.report.written += 1
            # Ids repeat in the released files; the index makes the key unique.
            yield f"{index}-{record.id}", {"record": json.dumps(to_json(record)), "images": images}


def build(
    name: str,
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    bad_records: str = "fail",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[pathlib.Path, BuildReport]:
    """Builds a dataset.

    Args:
      name: name of the dataset below `directory`.
      json_file: JSON array or JSONL of LLaVA records.
      image_root: directory that `image` paths are relative to.
      directory: where datasets go.
      bad_records: `fail` stops at the first bad record; `drop` leaves it out and counts it.
      progress: wraps the iteration over records, e.g. in a progress bar.

    Returns:
      (the dataset's directory, what happened). An existing dataset is left as it is.

    Raises:
      RecordError, ImageError: on a bad record, under `fail`.
    """
    if bad_records not in BAD_RECORD_POLICIES:
        raise ValueError(f"bad_records {bad_records!r} is not one of {BAD_RECORD_POLICIES}")
    config = LlavaConfig(
        name=name,
        json_file=os.fspath(json_file),
        image_root=os.fspath(image_root),
        bad_records=bad_records,
        progress=progress,
    )
    builder = Llava(data_dir=os.fspath(directory), config=config, file_format="array_record")
    manual = tfds.download.DownloadConfig(manual_dir=os.fspath(image_root))
    tfds.disable_progress_bar()  # `progress` shows the one bar there is.
    with contextlib.redirect_stdout(io.StringIO()):  # It announces a "download" on standard output.
        builder.download_and_prepare(download_config=manual)
    return pathlib.Path(builder.data_path), config.report


def open_dataset(directory: str | os.PathLike[str]) -> Any:
    """Random access to a built dataset: `len()` and `[i]`.

    Raises:
      FileNotFoundError: if nothing was built there.
    """
    if not (pathlib.Path(directory) / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"no dataset at {os.fspath(directory)}: build one with `sg4v data build`, or check the path"
        )
    return tfds.builder_from_directory(os.fspath(directory)).as_data_source("train")


def decode_example(example: dict[str, Any], source: str, index: int) -> tuple[Record, list[bytes]]:
    """The record and image bytes of an element of `open_dataset`."""
    record = parse_record(json.loads(example["record"]), source=source, index=index)
    return record, [bytes(image) for image in example["images"]]


def _read_image(root: str, name: str) -> bytes:
    path = resolve_image(root, name)
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: can't be read below {root}: {error.strerror}") from error
    # Decoded once here so that training never meets an unreadable image.
    load_image(data, name=name)
    return data
