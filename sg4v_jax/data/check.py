"""Looks through data files and their images before anything is built, and says what is wrong.

Every record goes through `data.defects.inspect_entry`, as in a build; what only a whole file shows
(repeated ids, lengths, counts by source) is added here.
"""

import collections
import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sg4v_jax.data.conversation import (
    IMAGE_PLACEHOLDER,
    encode_training,
    get_template,
    place_images,
    render,
)
from sg4v_jax.data.defects import Inspection, allowed_bad, inspect_entry
from sg4v_jax.data.folder import require_folder
from sg4v_jax.data.json_stream import Entry, Span, Split, read_span, split_entries
from sg4v_jax.data.processes import Steps, run_in_order
from sg4v_jax.data.records import Record, Turn
from sg4v_jax.data.sources import SOURCES, TEXT_ONLY, Release, release_of, source_of
from sg4v_jax.data.tokenizer import Tokenizer

EXAMPLES, SAMPLES = 5, 3  # for each kind of defect, and for each source
_UNKNOWN = "(unknown)"  # of an entry that can't be read
_SPAN = 256


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """What to look at.

    Attributes:
      tokenizer: a tokenizer.model to measure lengths in tokens; "" counts words.
      template: how training will write the records.
      image_tokens: features per image, which count as tokens.
      max_length: longer records are reported.
      decode: False looks at the headers of images only.
    """

    tokenizer: str = ""
    template: str = "v1"
    image_tokens: int = 576
    max_length: int = 2048
    decode: bool = True


@dataclasses.dataclass(frozen=True)
class Example:
    """A record that has a defect: its number in the file, its id, the image, what to say about it."""

    index: int
    id: str
    image: str
    message: str


@dataclasses.dataclass(frozen=True, order=True)
class Sample:
    """A record to show; `rank` picks it in a way that depends on nothing but its number."""

    rank: int
    index: int
    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


@dataclasses.dataclass
class FileReport:
    """What is in a data file, or in a part of it.

    Attributes:
      file: its path.
      release: what it is expected to hold, if it is a published one.
      records: entries, bad ones included.
      bad: records that can't be used.
      defects: how often each kind was found.
      examples: the first of each kind.
      sources: by source of the images: `records`, `bad`, `images`, `length` (the sum of what could be
        measured) and each kind of defect.
      lengths: how many usable records have which length.
      samples: a few records of each source.
      folders: whether the image folder of each source is there.
    """

    file: str
    release: Release | None = None
    records: int = 0
    bad: int = 0
    defects: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[Example]] = dataclasses.field(default_factory=dict)
    sources: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    lengths: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    samples: dict[str, list[Sample]] = dataclasses.field(default_factory=dict)
    folders: dict[str, bool] = dataclasses.field(default_factory=dict)

    def found(self, source: str, kind: str, example: Example) -> None:
        """Counts a defect."""
        self.defects[kind] += 1
        self.sources.setdefault(source, collections.Counter())[kind] += 1
        if len(self.examples.setdefault(kind, [])) < EXAMPLES:
            self.examples[kind].append(example)

    def add(self, other: "FileReport") -> None:
        """Adds what is in the next part of the file."""
        self.records += other.records
        self.bad += other.bad
        self.defects += other.defects
        self.lengths += other.lengths
        for kind, examples in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + examples)[:EXAMPLES]
        for source, counts in other.sources.items():
            self.sources.setdefault(source, collections.Counter()).update(counts)
        for source, samples in other.samples.items():
            self.samples[source] = heapq.nsmallest(SAMPLES, self.samples.get(source, []) + samples)


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
      image_root: what image paths are relative to.
      options: what was looked at.
      files: one report for each data file.
      max_bad: how many bad records were allowed, as given.
    """

    image_root: str
    options: CheckOptions
    files: tuple[FileReport, ...]
    max_bad: str

    @property
    def records(self) -> int:
        return sum(file.records for file in self.files)

    @property
    def bad(self) -> int:
        return sum(file.bad for file in self.files)

    @property
    def passed(self) -> bool:
        """Whether no more records are bad than allowed."""
        return self.bad <= allowed_bad(self.max_bad, self.records)


def check(
    files: Sequence[str | os.PathLike[str]],
    image_root: str | os.PathLike[str],
    options: CheckOptions | None = None,
    *,
    max_bad: str = "0",
    workers: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> CheckReport:
    """Looks through data files.

    Args:
      files: JSON arrays or JSONL of LLaVA records; local paths or URIs.
      image_root: directory or URI that `image` paths are relative to.
      options: what to look at.
      max_bad: a number or percentage of records that may be bad.
      workers: processes; the report does not depend on it.
      progress: wraps the iteration over records.

    Raises:
      RecordError: a file is no JSON array or JSONL, or is cut off.
      FileNotFoundError: there is no such file or image folder.
      ValueError: an option means nothing, such as an unknown template.
    """
    allowed_bad(max_bad, 0)
    paths = [os.fspath(file) for file in files]
    if len(set(paths)) < len(paths):
        raise ValueError(f"a file is given twice: {', '.join(paths)}")
    options = options or CheckOptions()
    get_template(options.template)
    require_folder(image_root)
    if options.tokenizer:
        Tokenizer(options.tokenizer)
    splits = [split_entries(path, _SPAN) for path in paths]
    reports = [FileReport(path, release_of(path)) for path in paths]
    jobs = [
        _Job(path, os.fspath(image_root), span, options)
        for path, split in zip(paths, splits, strict=True)
        for span in split.spans
    ]
    hashes = {report.file: _Hashes() for report in reports}
    by_file = {report.file: report for report in reports}

    def finished(part: "_Part") -> None:
        by_file[part.report.file].add(part.report)
        hashes[part.report.file].add(part)

    counts = [job.span.count for job in jobs]
    for _ in progress(Steps(run_in_order(_inspect_span, jobs, workers), counts, finished)):
        pass
    for report, split in zip(reports, splits, strict=True):
        _count_repeats(report, split, hashes[report.file])
        _look_for_folders(report, image_root)
    return CheckReport(os.fspath(image_root), options, tuple(reports), max_bad)


def quantile(lengths: Mapping[int, int], share: float) -> int:
    """The smallest length that at least `share` of the records don't exceed; 0 of none."""
    wanted, passed = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        passed += lengths[length]
        if passed >= wanted:
            return length
    return 0


@dataclasses.dataclass(frozen=True)
class _Job:
    file: str
    image_root: str
    span: Span
    options: CheckOptions


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is in a span; of each usable record the hashes of id and content, 0 of others: uint64[count]."""

    report: FileReport
    ids: np.ndarray
    contents: np.ndarray


class _Hashes:
    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._contents: list[np.ndarray] = []

    def add(self, part: _Part) -> None:
        self._ids.append(part.ids)
        self._contents.append(part.contents)

    def repeats(self) -> dict[str, np.ndarray]:
        """Numbers of records, int64[n, 2]: (a later one, the earlier one that it repeats)."""
        return {"duplicate_id": _repeats(self._ids), "duplicate_record": _repeats(self._contents)}


def _repeats(parts: list[np.ndarray]) -> np.ndarray:
    hashes = np.concatenate([np.zeros(0, np.uint64), *parts])
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    pairs = np.stack([order[1:], order[:-1]], axis=1)[same]
    return pairs[np.argsort(pairs[:, 0])]


def _inspect_span(job: _Job) -> _Part:
    report = FileReport(job.file)
    release = release_of(job.file)
    ids, contents = [], []
    for entry in read_span(job.file, job.span):
        found = inspect_entry(entry, source=job.file, image_root=job.image_root, decode=job.options.decode)
        _count(report, entry, found, job.options, release)
        value = entry.value if found.record and isinstance(entry.value, Mapping) else {}
        ids.append(_hash(found.id) if "id" in value else 0)
        contents.append(_hash(json.dumps(value, sort_keys=True)) if value else 0)
    return _Part(report, np.array(ids, np.uint64), np.array(contents, np.uint64))


def _count(
    report: FileReport, entry: Entry, found: Inspection, options: CheckOptions, release: Release | None
) -> None:
    index = entry.position.index
    if found.names:
        source = source_of(found.names[0], release)
    else:
        readable = isinstance(entry.value, Mapping) and "image" not in entry.value
        source = TEXT_ONLY if readable else _UNKNOWN
    counts = report.sources.setdefault(source, collections.Counter())
    report.records += 1
    counts["records"] += 1
    for name in found.names:
        report.sources.setdefault(source_of(name, release), collections.Counter())["images"] += 1
    for defect in found.defects:
        place = source_of(defect.image, release) if defect.image else source
        report.found(place, defect.kind, Example(index, found.id, defect.image, defect.message))
    if found.record is None:
        report.bad += 1
        counts["bad"] += 1
        return
    sample = Sample(
        _hash(str(index)),
        index,
        found.id,
        found.names,
        tuple((turn.role, turn.text) for turn in found.record.turns),
    )
    report.samples[source] = heapq.nsmallest(SAMPLES, [*report.samples.get(source, []), sample])
    where = f"{report.file}: {entry.position} (id {found.id!r})"
    try:
        length = record_length(found.record, options)
    except ValueError as error:
        report.found(source, "wrong_template", Example(index, found.id, "", f"{where}: {error}"))
        return
    report.lengths[length] += 1
    counts["length"] += length
    if length > options.max_length:
        unit = "tokens" if options.tokenizer else "words"
        message = f"{where}: {length} {unit} with its images, more than {options.max_length}"
        report.found(source, "too_long", Example(index, found.id, "", message))


def record_length(record: Record, options: CheckOptions) -> int:
    """Tokens of a record as training sees it, with its images and the template's own text.

    Without a tokenizer: words of the turns, and `image_tokens` for each image.

    Raises:
      ValueError: the template can't write the record.
    """
    images, template = len(record.images), get_template(options.template)
    turns = place_images(record.turns) if images else record.turns
    if not options.tokenizer:
        render(template, turns)  # Says whether it can.
        words = sum(len(_without_images(turn, images).split()) for turn in record.turns)
        return words + images * options.image_tokens
    encoded = encode_training(template, turns, _tokenizer(options.tokenizer), has_images=bool(images))
    # One placeholder for each image is among the tokens already.
    return len(encoded.tokens) + images * (options.image_tokens - 1)


def _without_images(turn: Turn, images: int) -> str:
    return turn.text.replace(IMAGE_PLACEHOLDER, " ") if images and turn.role == "human" else turn.text


def _count_repeats(report: FileReport, split: Split, hashes: _Hashes) -> None:
    for kind, pairs in hashes.repeats().items():
        if not len(pairs):
            continue
        report.defects[kind] = len(pairs)
        report.examples[kind] = []
        for later, earlier in pairs[:EXAMPLES].tolist():
            span = split.spans[later // _SPAN]
            entry = next(itertools.islice(read_span(report.file, span), later % _SPAN, None))
            assert isinstance(entry.value, Mapping)
            id_ = str(entry.value.get("id", ""))
            message = f"{report.file}: {entry.position} (id {id_!r}): as record {earlier}"
            report.examples[kind].append(Example(later, id_, "", message))


def _look_for_folders(report: FileReport, image_root: str | os.PathLike[str]) -> None:
    expected = report.release.counts if report.release else {}
    for source in sorted({*report.sources, *expected}):
        if source in SOURCES:
            for folder in SOURCES[source].folders:
                report.folders[folder] = (epath.Path(image_root) / folder).is_dir()


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    # 0 stands for "none".
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


@functools.cache
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)
