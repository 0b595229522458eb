"""The tables and charts of the report's page."""

from collections.abc import Sequence
from html import escape

import numpy as np

from sg4v_jax.caption.report.language import HOW_TO_GET, PARTS
from sg4v_jax.caption.report.measure import FLAGS, CaptionSet
from sg4v_jax.caption.report.phrases import KINDS
from sg4v_jax.caption.report.published import DATASETS, PREFERENCE
from sg4v_jax.caption.report.report import (
    QUANTILES,
    Report,
    length_numbers,
    repeated_captions,
    repeated_share,
    source_numbers,
)
from sg4v_jax.caption.report.votes import Share, Tally
from sg4v_jax.page.html import table
from sg4v_jax.page.svg import histogram

_BINS = 30
_MOST_SOURCES = 40


def comparison(report: Report) -> str:
    """Paired differences of two sets."""
    if not report.differences:
        return ""
    rows = [["on the same image", *_names(report), "difference", "95 % interval", "second has more", "less"]]
    for found in report.differences:
        name = found.name if found.name not in FLAGS else f"{found.name} (share)"
        low, high = found.difference - found.half_width, found.difference + found.half_width
        rows.append(
            [
                name,
                _number(found.first),
                _number(found.second),
                f"{'+' if found.difference > 0 else ''}{_number(found.difference)}",
                f"{_number(low)} to {_number(high)}" if np.isfinite(found.half_width) else "",
                f"{found.more:.1%}",
                f"{found.fewer:.1%}",
            ]
        )
    return _section(
        "Image by image",
        f"The {report.common:,} images that both sets have; of several captions of an image the first. Each "
        "number is taken per caption, and the difference is second minus first.",
        table(rows),
    )


def lengths(report: Report) -> str:
    """Distributions of characters and words."""
    charts = []
    for unit in ("characters", "words"):
        values = [captions.table[unit] for captions in report.sets]
        last = max(float(np.quantile(of, 0.995)) for of in values)
        edges = np.linspace(0, max(_BINS, np.ceil(last / _BINS) * _BINS), _BINS + 1)
        # The last bin takes all that is longer.
        counts = [np.histogram(np.minimum(of, edges[-1] - 0.5), edges)[0] / len(of) for of in values]
        charts.append(
            f"<figure><figcaption>{unit.capitalize()}<small>share of captions</small></figcaption>"
            f"{histogram(f'Length in {unit}', unit, edges.tolist(), [of.tolist() for of in counts])}</figure>"
        )
    rows = [["per caption", "set", "mean", *QUANTILES]]
    for unit in ("characters", "words", "sentences"):
        for captions in report.sets:
            found = length_numbers(captions.table, unit)
            rows.append(
                [unit, captions.name, f"{found['mean']:.1f}", *(f"{found[q]:.0f}" for q in QUANTILES)]
            )
    both = "" if len(report.sets) == 1 else f" Bars: {report.sets[0].name}; outline: {report.sets[1].name}."
    return _section(
        "Length",
        "Words are what white space separates. The last bin holds everything longer." + both,
        f"<div class=charts>{''.join(charts)}</div>{table(rows)}",
    )


def paper(report: Report) -> str:
    """The paper's tables with these sets as further rows."""
    rows = [["caption set", "images", "captioner sees them", "captions", "characters", "words"]]
    for of in DATASETS:
        words = str(of.words) if of.words else ""
        seen = "yes" if of.sees else "no"
        rows.append([f"{of.name} ({of.captioner})", of.images, seen, of.captions, str(of.characters), words])
    for captions in report.sets:
        shares = source_numbers(captions)
        images = ", ".join(list(shares)[:3]) + (", ..." if len(shares) > 3 else "")
        means = [f"{captions.table[unit].mean():.0f}" for unit in ("characters", "words")]
        rows.append([f"this report: {captions.name}", images, "", f"{len(captions):,}", *means])
    return _section(
        "Beside the paper's numbers",
        "Published: mean characters by the ShareGPT4V paper, mean words by the COCONut-PanCap "
        "paper's table of these datasets.",
        f"{table(rows)}<h3 class=gap>Which caption people prefer</h3>{_preference(report.tally)}",
    )


def parts_of_speech(report: Report) -> str:
    """Lexical composition."""
    title, found = "Lexical composition", [words.composition for words in report.languages]
    if any(of is None for of in found):
        return _section(title, f"Not computed: it needs the tagger HanTa. Get it with {HOW_TO_GET}.", "")
    compositions = [of for of in found if of is not None]
    rows = [["share of words", *_names(report)]]
    for part in (*PARTS, "other"):
        cells = [f"{of.shares[part]:.1%} ± {of.half_widths[part]:.1%}" for of in compositions]
        rows.append([part, *cells])
    sizes = " and ".join(f"{of.words:,} words of {of.captions:,} captions" for of in compositions)
    return _section(
        title,
        f"By HanTa's English model, on a sample: {sizes}. ± is a 95 % interval for the sample, not for the "
        "tagger's mistakes. The paper has such a table too, but its figures could not be had when this was "
        "written, and none are made up here.",
        table(rows),
    )


def diversity(report: Report) -> str:
    """Distinct n-grams, repetition, openings."""
    rows = [["", *_names(report)]]
    for n in (1, 2, 3):
        rows.append([f"distinct-{n}", *(f"{words.distinct[n][0]:.3f}" for words in report.languages)])
    tables = [captions.table for captions in report.sets]
    rows.append(["trigrams said before in the same caption", *(f"{repeated_share(of):.2%}" for of in tables)])
    rows.append(["captions equal to another image's", *(f"{repeated_captions(of):,}" for of in tables)])
    begins = "".join(
        f"<h3 class=gap>How they begin{f': {escape(captions.name)}' if len(report.sets) > 1 else ''}</h3>"
        + table([["first words", "captions"], *([first, f"{share:.1%}"] for first, share in words.openings)])
        for captions, words in zip(report.sets, report.languages, strict=True)
    )
    tokens = report.languages[0].tokens
    return _section(
        "Diversity",
        "distinct-n is the share of n-grams that are different from each other, in a sample cut to "
        f"{tokens:,} words; it falls with the size of the sample, so compare equal sizes only.",
        table(rows) + begins,
    )


def phrases(report: Report) -> str:
    """Counts of phrases that go with hallucinations."""
    head = [
        f"{name}{what}" for name in _prefixes(report) for what in ("captions with it", "per 100 captions")
    ]
    rows = [["kind", "meaning", *head]]
    for kind, about in KINDS.items():
        cells = []
        for captions in report.sets:
            counts = captions.table[kind]
            cells += [f"{(counts > 0).mean():.1%}", f"{100 * counts.mean():.0f}"]
        rows.append([kind, about.meaning, *cells])
    return _section(
        "Phrases at risk",
        "Counts of phrases, not judgements: nothing here looks at the image. More of them than in a set that "
        "you trust is a reason to look.",
        table(rows, name="meanings"),
    )


def flags(report: Report) -> str:
    """Counts of broken captions."""
    rows = [["flag", "meaning", *_names(report)]]
    for flag, meaning in FLAGS.items():
        cells = []
        for captions in report.sets:
            count = int(captions.table[flag].sum())
            unknown = flag == "cut off" and not captions.states_finished
            cells.append("–" if unknown else f"{count:,} ({count / len(captions):.2%})")
        rows.append([flag, meaning, *cells])
    return _section(
        "Flags",
        "What can be wrong with a caption as a text. – is what the files don't say.",
        table(rows, name="meanings"),
    )


def sources(report: Report) -> str:
    """A table by source for each set."""
    return "".join(_sources(report, captions) for captions in report.sets)


def notes(report: Report) -> str:
    """What was read and what was not."""
    items = []
    for captions in report.sets:
        images = len(np.unique(captions.table["image"]))
        skipped = "; ".join(
            f"{count:,} {reason} (first: {captions.skipped.examples[reason]})"
            for reason, count in captions.skipped.counts.most_common()
        )
        text = (
            f"{len(captions):,} captions of {images:,} images from {', '.join(captions.files[:3])}"
            f"{f' and {len(captions.files) - 3} more files' if len(captions.files) > 3 else ''}. "
            f"Without a caption: {skipped or 'nothing'}."
        )
        items.append(f"<dt>{escape(captions.name)}</dt><dd>{escape(text)}</dd>")
    return f"<section><h2>What was read</h2><dl>{''.join(items)}</dl></section>"


def _sources(report: Report, captions: CaptionSet) -> str:
    found, expected = source_numbers(captions), captions.expected
    head = ["source", "captions", *(["published"] if expected else []), "characters", "words", "sentences"]
    rows = [[*head, *KINDS, *(flag for flag in FLAGS if flag != "empty")]]
    for source in [*found, *(name for name in expected if name not in found)][:_MOST_SOURCES]:
        of = found.get(source, {})
        row = [source, f"{of.get('captions', 0):,}"]
        if expected:
            row.append(f"{expected[source]:,}" if source in expected else "")
        row += [f"{of[unit]:.0f}" if of else "" for unit in ("characters", "words", "sentences")]
        rows.append(row + [f"{of[name]:.1%}" if of else "" for name in rows[0][len(row) :]])
    more = f" The {len(found) - _MOST_SOURCES} smallest are left out." if len(found) > _MOST_SOURCES else ""
    return _section(
        f"By source{f': {captions.name}' if len(report.sets) > 1 else ''}",
        "The source is the first folder of the image's path. Means, and shares of captions with a phrase or "
        f"flag.{more}",
        table(rows, name="sources"),
    )


def _preference(tally: Tally | None) -> str:
    rows = [["vote", "first", "second", "comparable", "pairs", "votes"]]
    shares = [f"{share:.1%}" for share in PREFERENCE.values()]
    rows.append([f"published: {' or '.join(list(PREFERENCE)[:2])}", *shares, "", ""])
    if not tally:
        return table(rows) + "<p class=note>No votes on these sets: make a page with --preference.</p>"
    ours = [f"{of.share:.1%} ({_interval(of)})" for of in (tally.first, tally.second, tally.tie)]
    rows.append([f"this vote: {' or '.join(tally.names)}", *ours, f"{tally.pairs:,}", f"{tally.votes:,}"])
    agreement = "" if tally.agreement is None else f" Raters agree on {tally.agreement:.0%} of pairs."
    return table(rows) + (
        "<p class=note>In brackets 95 % intervals by the number of pairs. Sign test: p = "
        f"{tally.p_value:.3g}. The left caption won {tally.left.share:.0%} ({_interval(tally.left)}) of the "
        f"votes that are no tie.{agreement}</p>"
    )


def _interval(share: Share) -> str:
    return f"{share.low:.1%} to {share.high:.1%}"


def _names(report: Report) -> list[str]:
    return [captions.name for captions in report.sets]


def _prefixes(report: Report) -> Sequence[str]:
    return [f"{name}: " for name in _names(report)] if len(report.sets) > 1 else [""]


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class=note>{escape(note)}</p>{body}</section>"
