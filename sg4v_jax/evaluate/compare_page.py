"""A comparison as one page: radar, tables, and the samples that flipped with their images."""

import base64
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sg4v_jax.data.image import ImageError, load_image
from sg4v_jax.evaluate.answering import read_image
from sg4v_jax.evaluate.benchmark import Loaded
from sg4v_jax.evaluate.compare import Comparison, Flip, Flips, Row, change_text
from sg4v_jax.evaluate.files import write_text
from sg4v_jax.evaluate.radar import radar_chart
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.runner import read_samples
from sg4v_jax.page.html import document

SHOWN = 6  # flips of each kind above the fold; the first ones, not chosen
_KEPT = 60
_THUMBNAIL, _TEXT = 200, 600  # pixels, characters
_FEWEST_AXES = 3
_COLORS = ("#2b6289", "#c2542d", "#3b7d4f", "#7a4fa3", "#9a7b1c", "#5d6670")
_STYLE = (
    ".radar{max-width:52rem;margin:0 auto}.radar polygon{fill:none}.radar text{font-size:12px}"
    ".model polygon{stroke-width:2;fill-opacity:.07}"
    + "".join(
        f".m{i} polygon{{stroke:{c};fill:{c}}}.radar .m{i} circle,.k{i}{{fill:{c};background:{c}}}"
        for i, c in enumerate(_COLORS)
    )
    + ".key{display:flex;flex-wrap:wrap;gap:1.2rem;justify-content:center;font-size:.88rem}"
    ".key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.4rem}"
    ".flip{display:grid;grid-template-columns:9rem 1fr;gap:1.2rem;padding:1rem 0}"
    ".flip{border-top:1px solid var(--rule)}"
    ".flip img{width:9rem;border-radius:3px}.flip p{overflow-wrap:anywhere;white-space:pre-line}"
    ".flip .up{color:var(--right)}.flip .down{color:var(--wrong)}.sure{font-weight:600}"
)


def write_page(
    comparison: Comparison,
    first: str | os.PathLike[str],
    page: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Writes the page.

    Args:
      comparison: from `compare_runs`.
      first: directory of the first run, for the questions.
      page: where to write.
      data: the benchmarks' data, to show images; None shows none.
    """
    sections = [_header(comparison), _radar(comparison), _headlines(comparison)]
    for flips in comparison.flips:
        lines = read_samples(pathlib.Path(first) / flips.benchmark)
        questions = {line["id"]: line for line in lines}
        loaded = _load(flips.benchmark, data) if flips.gained or flips.lost else None
        sections.append(_flips(comparison, flips, questions, loaded))
    sections.append(_details(comparison))
    return write_text(pathlib.Path(page), document("sg4v eval", "\n".join(sections), style=_STYLE))


def _header(comparison: Comparison) -> str:
    first, *others = comparison.runs[: comparison.own]
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    against = f"{' and '.join(others)} against {first}" if others else first
    return (
        f"<header><p class=kicker>sg4v eval</p><h1>{escape(against)}</h1>"
        "<p class=lead>Differences are on the samples that both runs have, with the 95 % interval of a "
        "paired bootstrap; bold where it excludes no change, from twenty units on.</p>"
        f"{f'<ul class=bad>{notes}</ul>' if notes else ''}</header>"
    )


def _radar(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.headline]
    if len(rows) < _FEWEST_AXES:
        return ""
    models = {
        name: [row.values[i].value if row.values[i] else None for row in rows]  # type: ignore[union-attr]
        for i, name in enumerate(comparison.runs)
    }
    key = "".join(f"<span><i class=k{i}></i>{escape(n)}</span>" for i, n in enumerate(models))
    return (
        f"<section>{radar_chart([BENCHMARKS[row.benchmark].title for row in rows], models)}"
        f"<p class=key>{key}</p>"
        "<p class=note>Each axis ends at the best score shown and begins at half of it.</p></section>"
    )


def _headlines(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.headline]
    return f"<section><h2>Scores</h2>{_table(comparison, rows)}</section>"


def _details(comparison: Comparison) -> str:
    return (
        "<section><h2>All metrics</h2><details><summary>Every category</summary>"
        f"{_table(comparison, comparison.rows)}</details></section>"
    )


def _table(comparison: Comparison, rows: Sequence[Row]) -> str:
    runs = "".join(f"<th class=n>{escape(name)}</th>" for name in comparison.runs)
    body = []
    for row in rows:
        cells = "".join(f"<td class=n>{f'{v.value:.1f}' if v else '–'}</td>" for v in row.values)
        changes = "<br>".join(
            f"<span class={'sure' if change.significant else 'open'}>{change_text(change).rstrip('*')}</span>"
            for change in row.changes
            if change
        )
        title = f"{BENCHMARKS[row.benchmark].title} <small>{escape(row.metric)}</small>"
        body.append(f"<tr><th>{title}</th>{cells}<td class=n>{changes}</td></tr>")
    return (
        f"<div class=scroll><table><thead><tr><th></th>{runs}<th class=n>difference</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _flips(
    comparison: Comparison, flips: Flips, questions: Mapping[str, dict[str, Any]], loaded: Loaded | None
) -> str:
    images = {sample.id: sample.image for sample in loaded.samples} if loaded else {}
    names = (comparison.runs[0], comparison.runs[flips.run])

    def card(flip: Flip) -> str:
        picture = _picture(loaded, images.get(flip.id)) if loaded else ""
        return _card(names, flip, questions.get(flip.id, {}), picture)

    parts = []
    for title, kind in (("Gained", flips.gained), ("Lost", flips.lost)):
        rest = "".join(map(card, kind[SHOWN:_KEPT]))
        more = (
            f"<details><summary>{min(len(kind), _KEPT) - SHOWN} more</summary>{rest}</details>"
            if rest
            else ""
        )
        parts.append(f"<h3>{title} <small>{len(kind)}</small></h3>{''.join(map(card, kind[:SHOWN]))}{more}")
    return (
        f"<section><h2>{escape(BENCHMARKS[flips.benchmark].title)}: what flipped in "
        f"{escape(comparison.runs[flips.run])}</h2><p class=note>{len(flips.gained)} samples gained, "
        f"{len(flips.lost)} lost; p = {flips.p:.3g} by the sign test. The first ones, not chosen.</p>"
        f"{''.join(parts)}</section>"
    )


def _card(names: tuple[str, str], flip: Flip, question: Mapping[str, Any], picture: str) -> str:
    better = flip.scores[1] > flip.scores[0]
    answers = "".join(
        f"<p class={'up' if (side == 1) == better else 'down'}><b>{escape(name)}</b> "
        f"{escape(_short(answer))} <small>{score:.2f}</small></p>"
        for side, (name, answer, score) in enumerate(zip(names, flip.answers, flip.scores, strict=True))
    )
    truth = flip.truth if isinstance(flip.truth, str) else "; ".join(map(str, flip.truth or ()))
    return (
        f"<article class=flip><div>{picture}</div><div><small>{escape(flip.id)}</small>"
        f"<p>{escape(_short(str(question.get('question', ''))))}</p>{answers}"
        f"<p><small>truth: {escape(_short(truth))}</small></p></div></article>"
    )


def _load(name: str, data: str | os.PathLike[str] | None) -> Loaded | None:
    if data is None:
        return None
    try:
        return BENCHMARKS[name].load(pathlib.Path(data))
    except (OSError, ValueError):
        return None  # The page is about the runs; their data may have gone.


def _picture(loaded: Loaded, image: str | bytes | None) -> str:
    try:
        encoded = read_image(loaded.root, image)
        if not encoded:
            return ""
        picture = load_image(encoded[0], name=image if isinstance(image, str) else "image")
    except (OSError, ValueError, ImageError):
        return "<p class=bad>no image</p>"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"
