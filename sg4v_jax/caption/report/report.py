"""Everything a report shows, gathered: the page and the JSON are written from it."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sg4v_jax.caption.report import language
from sg4v_jax.caption.report.captions import Caption
from sg4v_jax.caption.report.compare import Difference, common_rows, differences
from sg4v_jax.caption.report.language import Composition
from sg4v_jax.caption.report.measure import FLAGS, CaptionSet
from sg4v_jax.caption.report.phrases import KINDS
from sg4v_jax.caption.report.sample import by_source, fetch, ranked
from sg4v_jax.caption.report.votes import Tally
from sg4v_jax.page.terminal import printable

QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
_EXAMPLES = 4  # of each flag
_LEAST_SHOWN = 12  # samples, where there are so many


@dataclasses.dataclass(frozen=True)
class Options:
    """How a report is made.

    Attributes:
      sample: captions whose words are looked at (parts of speech, distinct n-grams, openings).
      each: samples shown of each source, at least; more where there are few sources.
      most: samples shown in all.
      seed: of the samples.
    """

    sample: int = 1000
    each: int = 3
    most: int = 36
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sample, self.each, self.most) < 1 or self.seed < 0:
            raise ValueError(f"{self}: sample, each and most must be at least 1, seed at least 0")


@dataclasses.dataclass(frozen=True)
class Language:
    """What the words of a sample say about a set.

    Attributes:
      composition: parts of speech; None without the extra `report`.
      distinct: by n, (share of n-grams that are different, n-grams counted).
      tokens: the sample was cut to.
      openings: frequent first words and their shares.
    """

    composition: Composition | None
    distinct: dict[int, tuple[float, int]]
    tokens: int
    openings: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Report:
    """A report of one set, or of two on their common images.

    Attributes:
      image_root: where images are.
      sets: one or two.
      languages: of each set's sample; of two sets on the same images.
      common: images that both sets have; 0 for one set.
      differences: image by image; none for one set.
      shown: samples, one caption of each set for an image.
      examples: of each set, some captions by flag.
      options: how it was made.
      tally: votes; None if there are none.
    """

    image_root: str
    sets: tuple[CaptionSet, ...]
    languages: tuple[Language, ...]
    common: int
    differences: list[Difference]
    shown: list[tuple[Caption, ...]]
    examples: tuple[dict[str, list[Caption]], ...]
    options: Options
    tally: Tally | None = None


def make_report(
    sets: Sequence[CaptionSet],
    image_root: str | os.PathLike[str],
    options: Options | None = None,
    tally: Tally | None = None,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Report:
    """Looks at samples of one or two measured sets.

    Args:
      sets: one set, or two to compare.
      image_root: where images are.
      options: how.
      tally: votes on them.
      progress: wraps the iteration over sets.

    Raises:
      ValueError: two sets have no image in common, or a file has changed.
    """
    options = options or Options()
    if len(sets) == 2:
        rows: tuple[np.ndarray, ...] = common_rows(sets[0], sets[1])
        if not len(rows[0]):
            raise ValueError(
                f"{sets[0].name} and {sets[1].name} have no image in common: their 'image' paths must be "
                "relative to the same folder"
            )
    else:
        rows = (np.arange(len(sets[0])),)
    orders = [ranked(of.table, at, options.seed) for of, at in zip(sets, rows, strict=True)]
    each = max(options.each, -(-_LEAST_SHOWN // len(sets[0].sources)))
    shown_rows = by_source(sets[0].table, orders[0], each, options.most)
    partner = dict(zip(*(order.tolist() for order in orders), strict=True)) if len(sets) == 2 else {}
    shown_of = [shown_rows, [partner[row] for row in shown_rows]] if partner else [shown_rows]
    samples, shown, examples = [], [], []
    for of, order, show in progress(list(zip(sets, orders, shown_of, strict=True))):
        sample, flagged = order[: options.sample].tolist(), _flagged_rows(of, options.seed)
        found = fetch(of, [*sample, *show, *(row for rows in flagged.values() for row in rows)])
        samples.append([found[row].text for row in sample])
        shown.append([found[row] for row in show])
        examples.append({flag: [found[row] for row in rows] for flag, rows in flagged.items()})
    tokens = min(map(language.count_tokens, samples))
    return Report(
        image_root=os.fspath(image_root),
        sets=tuple(sets),
        languages=tuple(_language(texts, tokens) for texts in samples),
        common=len(rows[0]) if len(sets) == 2 else 0,
        differences=differences(sets[0], sets[1], (rows[0], rows[1])) if len(sets) == 2 else [],
        shown=list(zip(*shown, strict=True)),
        examples=tuple(examples),
        options=options,
        tally=tally,
    )


def _language(texts: list[str], tokens: int) -> Language:
    return Language(
        composition=language.composition(texts),
        distinct={n: language.distinct(texts, n, tokens) for n in (1, 2, 3)},
        tokens=tokens,
        openings=language.openings(texts),
    )


def _flagged_rows(captions: CaptionSet, seed: int) -> dict[str, list[int]]:
    table = captions.table
    rows = {flag: ranked(table, np.flatnonzero(table[flag]), seed)[:_EXAMPLES].tolist() for flag in FLAGS}
    return {flag: found for flag, found in rows.items() if found and flag != "empty"}


def length_numbers(table: np.ndarray, column: str) -> dict[str, float]:
    """Mean and quantiles of a column."""
    values = table[column]
    quantiles = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return {"mean": float(values.mean()), **dict(zip(QUANTILES, map(float, quantiles), strict=True))}


def source_numbers(captions: CaptionSet) -> dict[str, dict[str, float]]:
    """By source, the most frequent first: captions, mean lengths, shares with each flag and phrase."""
    table = captions.table
    found = {}
    for source in np.argsort(-np.bincount(table["source"]), kind="stable"):
        rows = table[table["source"] == source]
        found[captions.sources[source]] = {
            "captions": len(rows),
            **{name: float(rows[name].mean()) for name in ("characters", "words", "sentences")},
            **{name: float((rows[name] > 0).mean()) for name in (*KINDS, *FLAGS)},
        }
    return found


def repeated_share(table: np.ndarray) -> float:
    """The share of trigrams that were in the same caption before."""
    return float(table["repeated"].sum() / max(1, table["trigrams"].sum()))


def repeated_captions(table: np.ndarray) -> int:
    """Captions that are, word for word, those of an earlier image."""
    _, first = np.unique(table["image"], return_index=True)
    return len(first) - len(np.unique(table["text"][first]))


def numbers(report: Report) -> dict[str, Any]:
    """All numbers of a report as JSON-ready dictionaries."""
    return {
        "version": 1,
        "image_root": report.image_root,
        "options": dataclasses.asdict(report.options),
        "flags": FLAGS,
        "phrases": {name: kind.meaning for name, kind in KINDS.items()},
        "sets": [_set_numbers(*pair) for pair in zip(report.sets, report.languages, strict=True)],
        "common_images": report.common,
        "differences": [dataclasses.asdict(difference) for difference in report.differences],
        "votes": dataclasses.asdict(report.tally) if report.tally else None,
    }


def _set_numbers(captions: CaptionSet, words: Language) -> dict[str, Any]:
    table = captions.table
    return {
        "name": captions.name,
        "files": captions.files,
        "captions": len(table),
        "images": len(np.unique(table["image"])),
        "skipped": dict(captions.skipped.counts),
        "repeated_captions": repeated_captions(table),
        **{name: length_numbers(table, name) for name in ("characters", "words", "sentences")},
        "repeated_trigrams": repeated_share(table),
        "flags": {flag: int(table[flag].sum()) for flag in FLAGS},
        "states_finished": captions.states_finished,
        "phrases": {
            kind: {"captions": int((table[kind] > 0).sum()), "occurrences": int(table[kind].sum())}
            for kind in KINDS
        },
        "sources": source_numbers(captions),
        "published_sources": captions.expected,
        "language": dataclasses.asdict(words),
    }


def summary(report: Report) -> str:
    """The main numbers for a terminal."""
    names = [captions.name for captions in report.sets]
    tables = [captions.table for captions in report.sets]
    rows = [["", *names], ["captions", *(f"{len(table):,}" for table in tables)]]
    for unit in ("characters", "words"):
        rows.append([f"mean {unit}", *(f"{table[unit].mean():.1f}" for table in tables)])
    for n in (1, 2, 3):
        rows.append([f"distinct-{n}", *(f"{words.distinct[n][0]:.3f}" for words in report.languages)])
    rows.append(["repeated trigrams", *(f"{repeated_share(table):.2%}" for table in tables)])
    for name in (*FLAGS, *KINDS):
        rows.append([name, *(f"{(table[name] > 0).mean():.2%}" for table in tables)])
    for name in dict.fromkeys(name for captions in report.sets for name in captions.skipped.counts):
        rows.append([f"no caption: {name}", *(f"{of.skipped.counts[name]:,}" for of in report.sets)])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return printable("\n".join(lines))


def write_report(report: Report, page: str | os.PathLike[str]) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the page, and beside it its numbers as JSON.

    Returns:
      (page, JSON).
    """
    from sg4v_jax.caption.report.page import render

    html = pathlib.Path(page)
    html.parent.mkdir(parents=True, exist_ok=True)
    # Paths can hold what UTF-8 can't.
    html.write_bytes(render(report).encode("utf-8", "backslashreplace"))
    beside = html.with_suffix(".json")
    beside.write_text(json.dumps(numbers(report), indent=1) + "\n")
    return html, beside
