"""What a check found, as JSON for machines, a page for people and a summary for the terminal.

The page is one file without scripts; everything from the data is escaped, and the pictures are drawn
anew, so that no byte of an image file gets into it.
"""

import base64
import collections
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from html import escape
from typing import Any

from etils import epath

from sg4v_jax.data.check import CheckReport, Example, FileReport, Sample, quantile
from sg4v_jax.data.defects import KINDS, allowed_bad
from sg4v_jax.data.image import ImageError, load_image
from sg4v_jax.data.records import RecordError, resolve_image
from sg4v_jax.data.sources import SOURCES

_THUMBNAIL, _TEXT = 160, 600  # pixels, characters
_BINS = 24
_QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--bad:#b3261e;--note:#8a6100}
@media(prefers-color-scheme:dark){:root{--bad:#ff8a80;--note:#ffcf70}}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums}
.bad{color:var(--bad)}.note{color:var(--note)}
.verdict{font-size:1.2rem}
.bar{fill:currentColor;opacity:.65}.over{fill:var(--bad);opacity:1}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);padding:.7rem;overflow-wrap:anywhere}
figure img{max-width:160px;max-height:160px;margin:0 .4rem .4rem 0}
figure p{margin:.2rem 0;white-space:pre-line}code{overflow-wrap:anywhere}
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
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>sg4v data check</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>sg4v data check</h1>\n{verdict}\n"
        f"<p>Images below <code>{escape(report.image_root)}</code>.</p>\n{body}\n</body>\n</html>\n"
    )


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
            _table(_source_rows(file)),
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


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [
        "".join(f"<{tag}{'' if i == 0 else ' class=n'}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


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
    examples = "".join(f"<li>{_example(example)}</li>" for example in file.examples[kind])
    return (
        f"<details open><summary><b class={level}>{file.defects[kind]} {kind}</b> ({level}): "
        f"{escape(KINDS[kind].meaning)}</summary><ul>{examples}</ul></details>"
    )


def _example(example: Example) -> str:
    return f"<code>{escape(example.message)}</code>"


def _chart(file: FileReport, max_length: int) -> str:
    bins = _histogram(file)
    most = max((count for *_, count in bins), default=0) or 1
    bars = []
    for i, (first, last, count) in enumerate(bins):
        height = round(100 * count / most, 1)
        kind = "bar over" if first > max_length else "bar"
        bars.append(
            f"<rect class='{kind}' x='{i * 24}' y='{110 - height}' width='22' height='{height}'>"
            f"<title>{first} to {last}: {count}</title></rect>"
        )
    labels = "".join(
        f"<text x='{i * 24}' y='124' font-size='9' fill='currentColor'>{bins[i][0]}</text>"
        for i in range(0, len(bins), 4)
    )
    width = len(bins) * 24
    return f"<svg viewBox='0 0 {width} 128' width='{width}' role='img'>{''.join(bars)}{labels}</svg>"


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
        image = load_image(resolve_image(image_root, name).read_bytes(), name=name)
    except (ImageError, RecordError, OSError) as error:  # Changed since it was looked at.
        return f"<p class=bad>{escape(str(error))}</p>"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f"<img alt='{escape(name)}' src='data:image/jpeg;base64,{encoded}'>"
