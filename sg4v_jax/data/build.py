"""LLaVA-format JSON and image files to a TFDS dataset of array_record shards.

Images are stored as the verbatim bytes of their files, so building decides nothing about decoding;
text-only records store none. The records stay in the order of their file.

A file is cut into spans of records, a span becomes a shard, and a shard depends on nothing else. So
shards can be written by any number of processes or machines, and a build that was killed goes on with
those that are missing. `dataset_info.json`, which makes it a dataset, comes last.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from sg4v_jax.data.defects import allowed_bad, inspect_entry
from sg4v_jax.data.folder import require_folder, write_records
from sg4v_jax.data.json_stream import RecordError, Span, read_span, split_entries
from sg4v_jax.data.processes import Steps, run_in_order
from sg4v_jax.data.records import Record, parse_record, to_json

BAD_RECORD_POLICIES = ("fail", "drop")
# Of images of 50 KB to 1 MB this makes shards of 50 MB to 1 GB.
RECORDS_PER_SHARD = 1024

_FORMAT = 1
_INFO, _REPORT, _WORK = "dataset_info.json", "build_report.json", ".build"


@dataclasses.dataclass(frozen=True)
class Shard:
    """All there is to know to write one shard.

    Attributes:
      json_file: the records.
      image_root: what image paths are relative to.
      path: where it goes.
      mark: the file that says it is finished, and what is in it.
      span: its records.
      answered: False also takes questions without an answer.
      fail: whether to stop at a bad record, or to leave it out.
    """

    json_file: str
    image_root: str
    path: str
    mark: str
    span: Span
    answered: bool
    fail: bool


@dataclasses.dataclass
class BuildReport:
    """What a build did, or one shard of it.

    Attributes:
      written: records stored.
      num_bytes: their size.
      dropped: records left out, by what was wrong first (`data.defects.KINDS`).
      examples: the first error message of each kind.
    """

    written: int = 0
    num_bytes: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def drop(self, kind: str, message: str, count: int = 1) -> None:
        """Counts records that were left out."""
        self.dropped[kind] = self.dropped.get(kind, 0) + count
        self.examples.setdefault(kind, message)

    def add(self, other: "BuildReport") -> None:
        """Adds what another part of the build did."""
        self.written += other.written
        self.num_bytes += other.num_bytes
        for kind, count in other.dropped.items():
            self.drop(kind, other.examples[kind], count)


# Writes shards somewhere, and yields what each did, in order.
Executor = Callable[[Callable[[Shard], BuildReport], Sequence[Shard]], Iterator[BuildReport]]


def build(
    name: str,
    json_file: str | os.PathLike[str] | None,
    image_root: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    bad_records: str = "fail",
    max_bad: str = "100%",
    workers: int = 1,
    records_per_shard: int = RECORDS_PER_SHARD,
    executor: Executor | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[epath.Path, BuildReport]:
    """Builds a dataset, or goes on with a build that was interrupted.

    All paths may be URIs (`gs://bucket/data`). The same records give the same files, byte for byte,
    whatever `workers` and `executor` are and however often the build was interrupted.

    Args:
      name: name of the dataset below `directory`.
      json_file: JSON array or JSONL of LLaVA records; None makes a record without an answer of every
        image below `image_root`, to be captioned.
      image_root: directory that `image` paths are relative to.
      directory: where datasets go.
      bad_records: `fail` stops at the first bad record; `drop` leaves it out and counts it.
      max_bad: with `drop`, a number or percentage of records; the build fails if more are bad.
      workers: processes to write shards. More than one needs the usual `if __name__ == "__main__":`
        around the calling script.
      records_per_shard: records of the file per shard.
      executor: where to write the shards instead, such as `data.beam.on_beam(...)`.
      progress: wraps the iteration over records, e.g. in a progress bar.

    Returns:
      (the dataset's directory, what happened). A finished dataset of the same records is left as it is.

    Raises:
      RecordError, ImageError: on a bad record, under `fail`; on too many, under `drop`; on a file that
        is cut off.
      FileNotFoundError: there is no such file or image folder.
      ValueError: other records were built there under this name.
    """
    if bad_records not in BAD_RECORD_POLICIES:
        raise ValueError(f"bad_records {bad_records!r} is not one of {BAD_RECORD_POLICIES}")
    if bad_records == "fail" and max_bad != "100%":
        raise ValueError(f"max_bad {max_bad!r} goes with bad_records 'drop'; 'fail' takes none")
    allowed_bad(max_bad, 0)
    require_folder(image_root)
    target = epath.Path(directory) / "llava" / name / "1.0.0"
    work = target / _WORK
    answered = json_file is not None
    if json_file is None:
        json_file = work / "images.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        write_records(image_root, json_file)
    split = split_entries(json_file, records_per_shard)
    plan = {
        "format": _FORMAT,
        "sha256": split.sha256,
        "records": split.entries,
        "records_per_shard": records_per_shard,
    }
    if (target / _INFO).exists():
        return target, _existing(target, plan)
    _begin(work, plan)
    shards = [
        Shard(
            json_file=os.fspath(json_file),
            image_root=os.fspath(image_root),
            path=os.fspath(target / f"llava-train.array_record-{i:05d}-of-{len(split.spans):05d}"),
            mark=os.fspath(work / f"{i:05d}.json"),
            span=span,
            answered=answered,
            fail=bad_records == "fail",
        )
        for i, span in enumerate(split.spans)
    ]
    report, lengths = BuildReport(), []
    allowed = allowed_bad(max_bad, split.entries)

    def finished(part: BuildReport) -> None:
        report.add(part)
        lengths.append(part.written)
        _check_cap(report, allowed, split.entries, max_bad)

    run = executor or functools.partial(run_in_order, workers=workers)
    counts = [shard.span.count for shard in shards]
    for _ in progress(Steps(run(write_shard, shards), counts, finished)):
        pass
    if not report.written:
        raise RecordError(f"{os.fspath(json_file)}: no record to store; dropped: {report.dropped or 'none'}")
    _finish(target, plan, report, lengths)
    return target, report


def write_shard(shard: Shard) -> BuildReport:
    """Writes one shard, unless that is done already.

    Raises:
      RecordError, ImageError: on a bad record, if it shall fail.
    """
    mark = epath.Path(shard.mark)
    if mark.exists():
        report = BuildReport(**json.loads(mark.read_text()))
        if shard.fail and report.dropped:  # Written by a run that was to drop them.
            kind, message = next(iter(report.examples.items()))
            raise RecordError(message, kind)
        return report
    report, serializer = BuildReport(), _serializer()
    with _new_file(shard.path, mark.parent) as path:
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for entry in read_span(shard.json_file, shard.span):
            found = inspect_entry(
                entry, source=shard.json_file, image_root=shard.image_root, answered=shard.answered
            )
            if found.record is None:
                assert found.error is not None
                if shard.fail:
                    raise found.error
                defect = next(defect for defect in found.defects if defect.bad)
                report.drop(defect.kind, defect.message)
                continue
            example = {"record": json.dumps(to_json(found.record)), "images": list(found.images)}
            # Without `deterministic`, the order of the keys is another one in each process.
            proto = serializer.get_tf_example(_features().encode_example(example))
            data = proto.SerializeToString(deterministic=True)
            writer.write(data)
            report.written += 1
            report.num_bytes += len(data)
        writer.close()
    _write_text(mark, json.dumps(dataclasses.asdict(report)), mark.parent)
    return report


def open_dataset(directory: str | os.PathLike[str]) -> Any:
    """Random access to a built dataset: `len()` and `[i]`.

    Raises:
      FileNotFoundError: if nothing was built there.
      ValueError: it is not on a file system of this machine.
    """
    if "://" in os.fspath(directory):
        raise ValueError(
            f"{os.fspath(directory)}: array_record reads files, not URIs; mount the bucket (gcsfuse) and "
            "give that path"
        )
    if not (pathlib.Path(directory) / _INFO).is_file():
        raise FileNotFoundError(
            f"no dataset at {os.fspath(directory)}: build one with `sg4v data build`, or check the path"
        )
    return tfds.builder_from_directory(os.fspath(directory)).as_data_source("train")


def decode_example(
    example: dict[str, Any], source: str, index: int, *, answered: bool = True
) -> tuple[Record, list[bytes]]:
    """The record and image bytes of an element of `open_dataset`."""
    record = parse_record(json.loads(example["record"]), source=source, index=index, answered=answered)
    return record, [bytes(image) for image in example["images"]]


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    text = tfds.features.Tensor(shape=(), dtype=np.str_)
    # TFDS has no optional image, and would decode: plain bytes stay verbatim.
    return tfds.features.FeaturesDict({"record": text, "images": tfds.features.Sequence(text)})


@functools.cache
def _serializer() -> Any:
    return tfds.core.example_serializer.ExampleSerializer(_features().get_serialized_info())


def _existing(target: epath.Path, plan: Mapping[str, Any]) -> BuildReport:
    """What the finished dataset of the same plan holds."""
    report = target / _REPORT
    old = json.loads(report.read_text()) if report.exists() else {"plan": None}
    if old.pop("plan") != plan:
        raise ValueError(
            f"{target}: there is a dataset of other records or settings already; choose another name, or "
            "remove it"
        )
    _remove(target / _WORK)
    return BuildReport(**old)


def _begin(work: epath.Path, plan: Mapping[str, Any]) -> None:
    """Makes sure that the work found there, if any, is the same."""
    file = work / "plan.json"
    if not file.exists():
        work.mkdir(parents=True, exist_ok=True)
        _write_text(file, json.dumps(plan), work)
    elif json.loads(file.read_text()) != plan:
        raise ValueError(
            f"{work.parent}: there is an unfinished build of other records or settings; choose another "
            "name, or remove it"
        )


def _check_cap(report: BuildReport, allowed: int, records: int, max_bad: str) -> None:
    bad = sum(report.dropped.values())
    if bad > allowed:
        kind, message = next(iter(report.examples.items()))
        raise RecordError(
            f"{bad} bad records so far of {records}, more than max_bad {max_bad}: {report.dropped}; "
            f"see `sg4v data check`. The first: {message}",
            kind,
        )


def _finish(target: epath.Path, plan: Mapping[str, Any], report: BuildReport, lengths: Sequence[int]) -> None:
    work = target / _WORK
    _write_text(target / _REPORT, json.dumps({"plan": plan, **dataclasses.asdict(report)}, indent=1), work)
    # What tfds.folder_dataset.write_metadata does, which wants to find the shards where it writes.
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name="llava",
            version=tfds.core.Version("1.0.0"),
            data_dir=os.fspath(target),
            module_name="",
        ),
        features=_features(),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(
        data_dir=target, dataset_name="llava", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=list(lengths),
        num_bytes=report.num_bytes,
        filename_template=template,
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    with tempfile.TemporaryDirectory() as metadata:
        info.write_to_directory(metadata)
        for file in ("features.json", _INFO):
            _write_text(target / file, (pathlib.Path(metadata) / file).read_text(), work)
    _remove(work)


@contextlib.contextmanager
def _new_file(path: str, work: epath.Path) -> Iterator[str]:
    """A local file to write, that becomes `path` when it is complete."""
    remote = "://" in path
    place = tempfile.mkdtemp() if remote else tempfile.mkdtemp(dir=os.fspath(work))
    file = epath.Path(place) / "shard"
    try:
        yield os.fspath(file)
        if remote:
            file.copy(path, overwrite=True)  # Object stores show whole files only.
        else:
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            os.replace(file, path)
    finally:
        _remove(epath.Path(place))


def _write_text(path: epath.Path, text: str, work: epath.Path) -> None:
    """Writes a file that appears whole or not at all."""
    if "://" in os.fspath(path):
        path.write_text(text)
        return
    temporary = work / f"{path.name}.{os.getpid()}"
    temporary.write_text(text)
    temporary.replace(path)


def _remove(directory: epath.Path) -> None:
    if directory.exists():
        directory.rmtree()
