"""What a check found, as JSON for machines, a page for people and a summary for the terminal.

The page is one file without scripts; everything from the data is escaped, and the pictures are drawn
anew, so that no byte of an image file gets into it.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Sequence
from html import escape
from typing import Any

from etils import epath

from sg4v_jax.data.check import CheckReport, Example, FileReport, Sample, quantile
from sg4v_jax.data.defects import KINDS, allowed_bad
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import RecordError
from sg4v_jax.data.sources import SOURCES
from sg4v_jax.data.thumbnail import thumbnail
from sg4v_jax.page.html import data_uri, document, table
from sg4v_jax.page.svg import histogram

_THUMBNAIL, _TEXT = 160, 600  # pixels, characters
_BINS = 24
_QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
_STYLE = """
.noted { color: var(--accent); }
.verdict { font-size: 1.2rem; }
.chart { max-width: 40rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.samples figure { border: 1px solid var(--rule); padding: .7rem; overflow-wrap: anywhere; }
.samples img { max-width: 160px; max-height: 160px; margin: 0 .4rem .4rem 0; }
.samples p { margin: .2rem 0; white-space: pre-line; }
td { padding: .25rem .7rem; min-width: 0; }
h2 { margin-top: 2.5rem; }
h3 { margin-top: 1.5rem; }
"""


def write_report(report: CheckReport, page: str | os.PathLike[str]) -> tuple[epath.Path, epath.Path]:
    """Writes the page, and beside it the same as JSON.

    Returns:
      (page, JSON).
    """
    html = epath.Path(page)
    numbers = html.with_suffix(".json")
    html.parent.mkdir(parents=True, exist_ok=True)
    # Ids can hold what UTF-8 can't.
    html.write_bytes(render_page(report).encode("utf-8", "backslashreplace"))
    numbers.write_text(json.dumps(to_json(report), indent=1))
    return html, numbers


def to_json(report: CheckReport) -> dict[str, Any]:
    """Everything but the samples."""
    return {
        "version": 1,
        "passed": report.passed,
        "image_root": report.image_root,
        "records": report.records,
        "bad": report.bad,
        "max_bad": report.max_bad,
        "allowed_bad": allowed_bad(report.max_bad, report.records),
        "options": dataclasses.asdict(report.options),
        "length_unit": _unit(report),
        "kinds": {kind: dataclasses.asdict(about) for kind, about in KINDS.items()},
        "files": [_file_json(file, report) for file in report.files],
    }


def summary(report: CheckReport) -> str:
    """The same, short, for a terminal."""
    lines: list[str] = []
    for file in report.files:
        lines += [f"{file.file}: {file.records} records, {file.bad} bad{_expected(file)}", ""]
        lines += [*_columns(_source_rows(file)), ""]
        missing = [folder for folder, there in file.folders.items() if not there]
        for folder in missing:
            lines.append(f"  no folder {folder} below {report.image_root}: {_origin(folder)}")
        lines += [""] if missing else []
        for kind in _kinds(file):
            word = "bad" if KINDS[kind].bad else "note"
            lines.append(f"  {word:4}  {file.defects[kind]:7}  {kind}: {KINDS[kind].meaning}")
            lines.append(f"                 {file.examples[kind][0].message}")
        lines += ["", f"  length in {_unit(report)}: {_length_line(file)}", ""]
    lines.append(_verdict(report))
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


def render_page(report: CheckReport) -> str:
    """The page, as HTML."""
    verdict = f"<p class='verdict {'' if report.passed else 'bad'}'>{escape(_verdict(report))}</p>"
    body = "\n".join(_file_section(file, report) for file in report.files)
    header = (
        f"<h1>sg4v data check</h1>\n{verdict}\n<p>Images below <code>{escape(report.image_root)}</code>.</p>"
    )
    return document("sg4v data check", f"{header}\n{body}", style=_STYLE)


def _verdict(report: CheckReport) -> str:
    allowed = allowed_bad(report.max_bad, report.records)
    share = report.bad / report.records if report.records else 0.0
    state = "passed" if report.passed else "failed"
    return f"{state}: {report.bad} of {report.records} records are bad ({share:.2%}), {allowed} allowed"


def _unit(report: CheckReport) -> str:
    options = report.options
    if options.tokenizer:
        return f"tokens of {options.tokenizer} ({options.template}, {options.image_tokens} per image)"
    return f"words (no tokenizer given) and {options.image_tokens} per image"


def _expected(file: FileReport) -> str:
    if not file.release or file.release.records == file.records:
        return ""
    return f" (the released file has {file.release.records})"


def _file_json(file: FileReport, report: CheckReport) -> dict[str, Any]:
    return {
        "file": file.file,
        "records": file.records,
        "expected_records": file.release.records if file.release else None,
        "bad": file.bad,
        "defects": dict(sorted(file.defects.items())),
        "examples": {kind: [dataclasses.asdict(e) for e in es] for kind, es in sorted(file.examples.items())},
        "sources": {source: dict(sorted(counts.items())) for source, counts in sorted(file.sources.items())},
        "expected_sources": dict(file.release.counts) if file.release else {},
        "folders": file.folders,
        "lengths": {
            **{name: quantile(file.lengths, share) for name, share in _QUANTILES.items()},
            "mean": _mean(file),
            "too_long": file.defects["too_long"],
            "histogram": _histogram(file),
        },
    }


def _mean(file: FileReport) -> float:
    total = sum(length * count for length, count in file.lengths.items())
    return round(total / max(1, file.lengths.total()), 1)


def _histogram(file: FileReport) -> list[tuple[int, int, int]]:
    """(first length, last length, records) of bins of one width; the last takes the longest 0.1 %."""
    longest = quantile(file.lengths, 0.999)
    width = -(-(longest + 1) // _BINS)
    bins = [0] * (longest // width + 1)
    for length, count in file.lengths.items():
        bins[min(length // width, len(bins) - 1)] += count
    ends = [(i + 1) * width - 1 for i in range(len(bins))]
    ends[-1] = max(ends[-1], max(file.lengths, default=0))
    return [(i * width, end, count) for i, (end, count) in enumerate(zip(ends, bins, strict=True))]


def _length_line(file: FileReport) -> str:
    parts = [f"{name} {quantile(file.lengths, share)}" for name, share in _QUANTILES.items()]
    return f"mean {_mean(file)}, {', '.join(parts)}"


def _kinds(file: FileReport) -> list[str]:
    return [kind for kind in KINDS if file.defects[kind]]


def _source_rows(file: FileReport) -> list[list[str]]:
    """A table: what each source has, and its images' defects."""
    kinds = [kind for kind in _kinds(file) if kind.endswith("_image") or kind == "path_outside"]
    names = [kind.removesuffix("_image") for kind in kinds]
    expected = file.release.counts if file.release else {}
    rows = [["source", "records", *(["expected"] if expected else []), "bad", "images", *names]]
    for source in sorted({*file.sources, *expected}):
        counts = file.sources.get(source, collections.Counter())
        row = [source, str(counts.get("records", 0))]
        if expected:
            row.append(str(expected.get(source, "")))
        rows.append(row + [str(counts.get(key, 0)) for key in ("bad", "images", *kinds)])
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _file_section(file: FileReport, report: CheckReport) -> str:
    return "\n".join(
        [
            f"<h2>{escape(file.file)}</h2>",
            f"<p>{file.records} records, {file.bad} bad{escape(_expected(file))}.</p>",
            table(_source_rows(file)),
            _folder_table(file),
            "<h3>Defects</h3>" if file.defects else "<h3>No defects</h3>",
            *(_defect(kind, file) for kind in _kinds(file)),
            f"<h3>Length</h3><p>In {escape(_unit(report))}: {_length_line(file)}. "
            f"{file.defects['too_long']} of {file.lengths.total()} usable records are longer than "
            f"{report.options.max_length}.</p>",
            _chart(file, report.options.max_length),
            "<h3>Samples</h3><div class='samples'>",
            *(
                _figure(source, sample, report.image_root)
                for source in sorted(file.samples)
                for sample in file.samples[source]
            ),
            "</div>",
        ]
    )


def _folder_table(file: FileReport) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(folder)}</code></td><td{'' if there else ' class=bad'}>"
        f"{'there' if there else 'not there'}</td><td>{escape(_origin(folder))}</td></tr>"
        for folder, there in file.folders.items()
    )
    return f"<h3>Image folders</h3><table>{rows}</table>" if rows else ""


def _origin(folder: str) -> str:
    return SOURCES[folder.partition("/")[0]].origin


def _defect(kind: str, file: FileReport) -> str:
    level = "bad" if KINDS[kind].bad else "note"
    color = "bad" if KINDS[kind].bad else "noted"
    examples = "".join(f"<li>{_example(example)}</li>" for example in file.examples[kind])
    return (
        f"<details open><summary><b class={color}>{file.defects[kind]} {kind}</b> ({level}): "
        f"{escape(KINDS[kind].meaning)}</summary><ul>{examples}</ul></details>"
    )


def _example(example: Example) -> str:
    return f"<code>{escape(example.message)}</code>"


def _chart(file: FileReport, max_length: int) -> str:
    bins = _histogram(file)
    # Bins are of one width; the last one takes all that is longer.
    edges = [*(first for first, *_ in bins), bins[-1][0] + (bins[1][0] if bins[1:] else 1)]
    shares = [count / max(1, file.lengths.total()) for *_, count in bins]
    return histogram("Lengths", f"length; {max_length} is the limit", edges, [shares])


def _figure(source: str, sample: Sample, image_root: str) -> str:
    pictures = "".join(_picture(image_root, name) for name in sample.images)
    turns = "".join(f"<p><b>{role}</b> {escape(_short(text))}</p>" for role, text in sample.turns[:4])
    more = f"<p>({len(sample.turns) - 4} more turns)</p>" if len(sample.turns) > 4 else ""
    return (
        f"<figure>{pictures}<figcaption>{escape(source)}, record {sample.index}, "
        f"id <code>{escape(sample.id)}</code></figcaption>{turns}{more}</figure>"
    )


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"


def _picture(image_root: str, name: str) -> str:
    try:
        data = thumbnail(image_root, name, _THUMBNAIL)
    except (ImageError, RecordError, OSError) as error:  # Changed since it was looked at.
        return f"<p class=bad>{escape(str(error))}</p>"
    return f"<img alt='{escape(name)}' src='{data_uri(data)}'>"
