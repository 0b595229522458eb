"""The demo's report as one page: no scripts, no network, light and dark."""

from __future__ import annotations

import itertools
from html import escape
from typing import TYPE_CHECKING

from sg4v_jax.demo.marking import mark
from sg4v_jax.demo.report_style import STYLE
from sg4v_jax.page import svg
from sg4v_jax.page.html import bar, data_uri, document, figures
from sg4v_jax.world import answer_accuracy, dense, facts, load_photos, parse

if TYPE_CHECKING:
    from sg4v_jax.demo.report import Report

SHOWN = 6  # samples above the fold; the first ones, not chosen


def page(report: Report) -> str:
    """The page of a report; everything that a model wrote is escaped."""
    sections = (_header, _stages, _samples, _scores, _curves, _photos, _notes)
    body = "\n".join(section(report) for section in sections)
    return document("sg4v_jax demo", body, style=STYLE)


def _header(report: Report) -> str:
    captioner, blind = report.f1["captioner"].f1, report.blind.f1
    numbers = [
        (f"{captioner:.3f}", "caption F1", f"the captioner, on held-out images; blind {blind:.3f}"),
        (f"{report.accuracy.overall:.1%}", "answers right", f"after tuning; majority {report.majority:.1%}"),
        (_duration(sum(report.times.values())), "wall clock", "sum of the stages below, from random weights"),
        (
            "same" if report.reload_equal else "differs",
            "after export",
            "written as Hugging Face LLaVA, loaded back, compared",
        ),
    ]
    return (
        "<header><p class=kicker>sg4v_jax demo</p>"
        "<h1>Describe what you see, then learn from the descriptions</h1>"
        "<p class=lead>The ShareGPT4V loop on a small drawn world whose truth is known exactly: "
        "a captioner learns from dense captions, describes the images that have none, and a model "
        "pre-trained on its captions is tuned to answer questions.</p>"
        f"{figures(numbers)}</header>"
    )


def _stages(report: Report) -> str:
    longest = max(report.times.values(), default=0) or 1
    items = "".join(
        f"<li><span class=number>{number}</span><span class=title>{escape(title)}</span>"
        f"<strong>{_seconds(seconds)}</strong>{bar(seconds / longest)}</li>"
        for number, (title, seconds) in enumerate(report.times.items(), 1)
    )
    return (
        f"<section><h2>The loop</h2><ol class=flow>{items}</ol>"
        "<p class=note>Seconds of this call; what an earlier call had finished is not done again.</p>"
        "</section>"
    )


def _samples(report: Report) -> str:
    asked = _questions_by_image(report)
    cards = [
        _card(report, index, asked[index] if index < len(asked) else [])
        for index in range(len(report.images))
    ]
    rest = ""
    if cards[SHOWN:]:
        rest = f"<details><summary>The other {len(cards) - SHOWN}</summary>{''.join(cards[SHOWN:])}</details>"
    return (
        "<section><h2>Held-out images</h2>"
        f"<p class=note>The first {len(cards[:SHOWN])} of {len(cards)}, not chosen. In the captioner's "
        "captions, words that state a fact are <span class=right>right</span> or "
        "<span class=wrong>wrong</span>.</p>"
        f"{''.join(cards[:SHOWN])}{rest}</section>"
    )


def _card(report: Report, index: int, questions: list[dict[str, str]]) -> str:
    caption, scene = report.captions["captioner"][index], report.scenes[index]
    stated, true = parse(caption), facts(scene)
    count = f"{len(stated & true)} of {len(true)} facts"
    if stated - true:
        count += f", {len(stated - true)} wrong"
    return (
        f"<article class=card>{_image(report.images[index], 'held-out scene')}<div>"
        f"<h3>Captioner <small>{count}</small></h3><p>{_marked(report, index)}</p>"
        f"<h3>Truth</h3><p class=truth>{escape(dense(scene))}</p></div>"
        f"<div><h3>Questions</h3><ul class=qa>{''.join(map(_question, questions))}</ul></div></article>"
    )


def _marked(report: Report, index: int) -> str:
    names = {True: "right", False: "wrong"}
    return "".join(
        escape(piece.text)
        if piece.right is None
        else f"<span class={names[piece.right]}>{escape(piece.text)}</span>"
        for piece in mark(report.captions["captioner"][index], report.scenes[index])
    )


def _question(line: dict[str, str]) -> str:
    right = answer_accuracy([line["answer"]], [line["truth"]]).overall == 1
    sign = '<b class="tick">✓</b>' if right else '<b class="cross">✗</b>'
    truth = "" if right else f" <small>truth: {escape(line['truth'])}</small>"
    answer = escape(line["answer"]) or "<i>nothing</i>"
    return f"<li>{sign}<span>{escape(line['question'])} <em>{answer}</em>{truth}</span></li>"


def _questions_by_image(report: Report) -> list[list[dict[str, str]]]:
    """The questions of the first image, of the second, ..."""
    return [list(group) for _, group in itertools.groupby(report.questions, key=lambda line: line["image"])]


def _scores(report: Report) -> str:
    columns = report.f1_columns()
    head = "".join(f"<th>{escape(heading)}</th>" for heading in columns)
    rows = []
    for attribute, score in report.blind.report.per_attribute.items():
        cells = "".join(_cell(column.per_attribute[attribute].f1) for column in columns.values())
        rows.append(f"<tr><th>{attribute}</th>{cells}<td class=count>{score.true}</td></tr>")
    overall = "".join(_cell(column.f1) for column in columns.values())
    count = report.blind.report.overall.true
    rows.append(f"<tr class=total><th>overall</th>{overall}<td class=count>{count}</td></tr>")
    return (
        "<section><h2>Facts in captions</h2>"
        f"<p class=note>F1 of the facts that the captions of {len(report.images)} held-out images state.</p>"
        f"<table class=f1><thead><tr><th></th>{head}<th class=count>facts</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></section>{_answers(report)}"
    )


def _answers(report: Report) -> str:
    rows = "".join(
        f"<tr><th>{escape(category)}</th>{_cell(share)}</tr>"
        for category, share in report.accuracy.per_category.items()
    )
    return (
        "<section><h2>Answers to questions</h2>"
        f"<p class=note>Share of {len(report.questions)} held-out questions answered right. Majority: always "
        "the most frequent answer of the question's category.</p><table class=qa-table>"
        f"<tbody>{rows}<tr class=total><th>overall</th>{_cell(report.accuracy.overall)}</tr>"
        f"<tr><th>majority</th>{_cell(report.majority)}</tr></tbody></table></section>"
    )


def _curves(report: Report) -> str:
    curves = {
        stage: [(line["step"] + 1, line["loss"]) for line in lines] for stage, lines in report.curves.items()
    }
    shown = [y for points in curves.values() for _, y in svg.usable(points)]
    bounds = svg.log_bounds(shown)
    charts = "".join(
        f"<figure><figcaption>{escape(stage)}<small>{_last(report, stage)}</small></figcaption>"
        f"{svg.loss_chart(f'Loss of {stage}', points, bounds)}</figure>"
        for stage, points in curves.items()
    )
    return (
        "<section><h2>Training loss</h2><p class=note>Nats per supervised token, one logarithmic scale for "
        "all stages; pale as logged, bold a running mean.</p>"
        f"<div class=charts>{charts}</div></section>"
    )


def _last(report: Report, stage: str) -> str:
    lines = report.curves[stage]
    return f"{lines[-1]['step'] + 1} steps, last loss {lines[-1]['loss']:.3f}" if lines else "nothing logged"


def _photos(report: Report) -> str:
    if not report.photos:
        return ""
    learned = {photo.encoded: photo.caption for photo in load_photos()}
    cards = []
    for encoded, caption in report.photos:
        word_for_word = learned.get(encoded, "").split() == caption.split()
        note = "its training caption, word for word" if word_for_word else "not its training caption"
        cards.append(
            f"<figure>{_image(encoded, 'training photograph')}<figcaption><small>{note}</small>"
            f"<p>{escape(caption)}</p></figcaption></figure>"
        )
    return (
        "<section><h2>Photographs, learned by heart</h2><p class=note>These are training images. A caption "
        "that is recited shows that real files pass through the pipeline, and nothing about what the "
        f"captioner sees in other photographs.</p><div class=photos>{''.join(cards)}</div></section>"
    )


def _notes(report: Report) -> str:
    blind = report.blind
    notes = {
        "Blind": "What a captioner that ignores the image can reach, the better of two ways: the captioner's "
        f"own captions scored against all the wrong scenes (F1 {blind.deranged.f1:.3f}), or the one training "
        f"caption that fits all scenes best (F1 {blind.constant.f1:.3f}).",
        "Start": "There are no pre-trained weights here. The captioner starts from random weights, and its "
        "weights stand in for CLIP, Vicuna and LLaVA-1.5's projector where pre-training starts.",
        "Wrong": "Marked as the score counts: everything said of a place that is empty is wrong, and so is a "
        "relation between two things that a dense caption would not relate, even where it holds.",
        "Held-out": "No held-out scene is equal to a training scene, but all are drawn by the same rules. "
        "The numbers say that the pipeline learns, not how well it would do on photographs.",
    }
    items = "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in notes.items())
    return f"<section><h2>Notes</h2><dl>{items}</dl></section>"


def _image(encoded: bytes, description: str) -> str:
    return f'<img alt="{description}" src="{data_uri(encoded)}">'


def _cell(share: float) -> str:
    return f"<td>{share:.3f}{bar(share)}</td>"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 100 else _seconds(seconds)
