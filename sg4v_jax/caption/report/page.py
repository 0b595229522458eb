"""The report as one page: samples first, then the tables of `tables.py`."""

import os
from collections.abc import Sequence
from html import escape

import numpy as np

from sg4v_jax.caption.report import tables
from sg4v_jax.caption.report.captions import Caption
from sg4v_jax.caption.report.measure import FLAGS
from sg4v_jax.caption.report.phrases import KINDS, find_phrases
from sg4v_jax.caption.report.report import Report, length_numbers
from sg4v_jax.caption.report.style import STYLE
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import RecordError
from sg4v_jax.data.thumbnail import thumbnail
from sg4v_jax.page.html import data_uri, document, figures

_THUMBNAIL = 352  # pixels; shown at half of it
_TEXT = 4000  # characters of a caption that are shown


def render(report: Report) -> str:
    """The page of a report; everything that captioners wrote is escaped."""
    sections = (
        _header,
        _samples,
        tables.comparison,
        tables.lengths,
        tables.paper,
        tables.parts_of_speech,
        tables.diversity,
        tables.phrases,
        _flags,
        tables.sources,
        tables.notes,
    )
    body = "\n".join(section(report) for section in sections)
    return document("Caption report", body, style=STYLE)


def picture(root: str | os.PathLike[str], name: str, side: int = _THUMBNAIL) -> str:
    """An image as HTML, or why there is none."""
    try:
        uri = data_uri(thumbnail(root, name, side))
    except (ImageError, RecordError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f'<p class="missing">{escape(name)}: {escape(reason)}</p>'
    return f'<img alt="{escape(name)}" src="{uri}">'


def _header(report: Report) -> str:
    parts = []
    for captions in report.sets:
        table, name = captions.table, f"{captions.name}, " if len(report.sets) > 1 else ""
        characters, words = length_numbers(table, "characters"), length_numbers(table, "words")
        flagged = np.any([table[flag] for flag in FLAGS], axis=0)
        numbers = [
            (f"{len(table):,}", "captions", f"{name}{_sources(len(captions.sources))}"),
            (f"{characters['mean']:.0f}", "characters", f"on average; median {characters['median']:.0f}"),
            (f"{words['mean']:.0f}", "words", f"on average; median {words['median']:.0f}"),
            (f"{flagged.mean():.1%}", "flagged", "refusals, loops, open ends, ..."),
        ]
        parts.append(figures(numbers))
    title = " and ".join(f"<em>{escape(captions.name)}</em>" for captions in report.sets)
    return (
        f"<header><p class=kicker>sg4v report</p><h1>Captions of {title}</h1>"
        "<p class=lead>What the captions are like: their length, words and habits, beside the images that "
        f"they describe. Images below <code>{escape(report.image_root)}</code>.</p>{''.join(parts)}</header>"
    )


def _samples(report: Report) -> str:
    legend = ", ".join(f"<mark class={kind}>{kind}</mark>" for kind in KINDS)
    names = [captions.name for captions in report.sets]
    cards = "".join(_card(report.image_root, captions, names) for captions in report.shown)
    which = f"the {report.common:,} images that both sets have" if report.common else "all captions"
    return (
        f"<section><h2>Samples</h2><p class=note>{len(report.shown)} at random from {which} (seed "
        f"{report.options.seed}), spread over the sources. Marked are phrases that often "
        f"go with things which are not in the image: {legend}. A mark is no judgement.</p>{cards}</section>"
    )


def _card(root: str, captions: Sequence[Caption], names: Sequence[str]) -> str:
    columns = "".join(
        f"<div>{f'<h3>{escape(name)}</h3>' if len(names) > 1 else ''}{marked(caption)}</div>"
        for name, caption in zip(names, captions, strict=True)
    )
    image = captions[0].image
    return (
        f'<article class="card sets{len(names)}"><div>{picture(root, image)}'
        f"<small><code>{escape(image)}</code></small></div>{columns}</article>"
    )


def marked(caption: Caption) -> str:
    """A caption as a paragraph with its phrases marked."""
    text, parts, at = caption.text[:_TEXT], [], 0
    for first, end, kind in find_phrases(text):
        parts.append(
            f'{escape(text[at:first])}<mark class={kind} title="{kind}">{escape(text[first:end])}</mark>'
        )
        at = end
    more = "…" if len(caption.text) > _TEXT else ""
    size = f"{len(caption.text)} characters, {len(caption.text.split())} words"
    cut = " · cut off" if caption.finished is False else ""
    return f'<p class="text">{"".join(parts)}{escape(text[at:])}{more}</p><small>{size}{cut}</small>'


def _flags(report: Report) -> str:
    return tables.flags(report) + "".join(
        f"<details><summary>{escape(flag)}{_of(report, index)}: {len(captions)} examples</summary>"
        f"{''.join(_card(report.image_root, [caption], ['']) for caption in captions)}</details>"
        for index, examples in enumerate(report.examples)
        for flag, captions in examples.items()
    )


def _sources(count: int) -> str:
    return f"{count} sources" if count > 1 else "one source"


def _of(report: Report, index: int) -> str:
    return f" in {escape(report.sets[index].name)}" if len(report.sets) > 1 else ""
