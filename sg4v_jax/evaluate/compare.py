"""Runs side by side: differences, whether they are more than chance, and the samples that flipped."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sg4v_jax.evaluate.benchmark import Marked, Metric
from sg4v_jax.evaluate.published import PUBLISHED
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.runner import read_marked, read_scores
from sg4v_jax.evaluate.statistics import Estimate, difference, estimate, sign_test

# With fewer units a bootstrap's interval is too narrow to conclude anything from.
_FEWEST_UNITS = 20
_SETTINGS = ("mode", "template", "aspect", "max_new_tokens", "precision", "digest")


@dataclasses.dataclass(frozen=True)
class Change:
    """What a later run did to a metric of the first.

    Attributes:
      difference: of the metric, on the units that both have, with its paired interval.
    """

    difference: Estimate

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval excludes no change at all, and there is enough to tell."""
        enough = self.difference.units >= _FEWEST_UNITS
        return enough and (self.difference.low > 0 or self.difference.high < 0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A metric of all runs.

    Attributes:
      benchmark: its name.
      metric: the metric's name.
      headline: whether it is the one that tables quote.
      values: of each run, None where it has none.
      changes: of each run against the first, None for the first and where one has none.
    """

    benchmark: str
    metric: str
    headline: bool
    values: tuple[Estimate | None, ...]
    changes: tuple[Change | None, ...]


@dataclasses.dataclass(frozen=True)
class Flip:
    """A sample that two runs score differently: (first, later) answers and scores."""

    id: str
    truth: Any
    answers: tuple[str, str]
    scores: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Flips:
    """All that flipped in one benchmark between the first and one later run.

    Attributes:
      benchmark: its name.
      run: the later run's index.
      gained: samples with a higher score in the later run.
      lost: samples with a lower one.
      p: of so uneven a split by chance (sign test; McNemar's, where scores are 0 and 1).
    """

    benchmark: str
    run: int
    gained: tuple[Flip, ...]
    lost: tuple[Flip, ...]
    p: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that `compare_runs` found.

    Attributes:
      runs: their names; published ones have values only.
      own: how many of them are runs of ours; the first ones.
      rows: metrics, those of a benchmark together.
      flips: by benchmark and later run.
      notes: settings and data that differ, and benchmarks that only some runs have.
    """

    runs: tuple[str, ...]
    own: int
    rows: tuple[Row, ...]
    flips: tuple[Flips, ...]
    notes: tuple[str, ...]


def compare_runs(outputs: Sequence[str | os.PathLike[str]], published: Sequence[str] = ()) -> Comparison:
    """Compares directories that `run_benchmark` wrote; the first is what the others are compared with.

    Raises:
      FileNotFoundError: a directory has no finished benchmark.
      ValueError: no published scores have such a name.
    """
    folders = [pathlib.Path(output) for output in outputs]
    scores = [read_scores(folder) for folder in folders]
    for folder, found in zip(folders, scores, strict=True):
        if not found:
            raise FileNotFoundError(f"{folder}: no finished benchmark in it")
    if unknown := [name for name in published if name not in PUBLISHED]:
        raise ValueError(f"no published scores of {unknown[0]!r}; there are {', '.join(PUBLISHED)}")
    names = [name for name in BENCHMARKS if any(name in found for found in scores)]
    rows: list[Row] = []
    flips: list[Flips] = []
    notes: list[str] = []
    labels = _labels(folders)
    for name in names:
        marked = [read_marked(f / name) if name in s else None for f, s in zip(folders, scores, strict=True)]
        notes += _notes(name, [found.get(name) for found in scores], labels)
        rows += _rows(name, marked, published)
        first = marked[0]
        flips += [_flips(name, i, first, m) for i, m in enumerate(marked) if i and first and m]
    return Comparison((*labels, *published), len(labels), tuple(rows), tuple(flips), tuple(notes))


def table(comparison: Comparison, *, headlines: bool = True) -> str:
    """The comparison as text.

    Args:
      comparison: what to show.
      headlines: only the metrics that tables quote; False shows all.
    """
    width = max(12, *(len(name) + 2 for name in comparison.runs))
    head = f"{'':<40}" + "".join(f"{name:>{width}}" for name in comparison.runs)
    lines = [head + ("   difference, 95 % interval" if len(comparison.runs) > 1 else "")]
    for row in comparison.rows:
        if headlines and not row.headline:
            continue
        values = "".join(f"{f'{v.value:.2f}' if v else '':>{width}}" for v in row.values)
        changes = "   ".join(map(change_text, filter(None, row.changes)))
        lines.append(
            f"{f'{BENCHMARKS[row.benchmark].title}: {row.metric}'[:39]:<40}{values}   {changes}".rstrip()
        )
    for flips in comparison.flips:
        lines.append(
            f"{flips.benchmark}, {comparison.runs[flips.run]}: {len(flips.gained)} samples gained, "
            f"{len(flips.lost)} lost, p = {flips.p:.3g}"
        )
    return "\n".join([*lines, "* the interval excludes no change", *comparison.notes])


def change_text(change: Change) -> str:
    """A difference with its interval, starred if it is more than chance."""
    d = change.difference
    return f"{d.value:+.2f} ({d.low:+.2f} to {d.high:+.2f}){'*' if change.significant else ''}"


def _labels(folders: Sequence[pathlib.Path]) -> tuple[str, ...]:
    names = [folder.name or os.fspath(folder) for folder in folders]
    return tuple(
        name if names.count(name) == 1 else os.fspath(f) for name, f in zip(names, folders, strict=True)
    )


def _rows(name: str, marked: Sequence[list[Marked] | None], published: Sequence[str]) -> list[Row]:
    benchmark = BENCHMARKS[name]
    metrics = [{m.name: m for m in benchmark.metrics(x) if m.measured} if x else {} for x in marked]
    known = [PUBLISHED[model] for model in published]
    order = dict.fromkeys(metric for found in metrics for metric in found)
    order |= dict.fromkeys(metric for row in known for other, metric in row if other == name)
    headline = benchmark.headline or next(iter(order), "")
    rows = []
    for metric in order:
        own = [found.get(metric) for found in metrics]
        quoted = [_quoted(row[name, metric]) if (name, metric) in row else None for row in known]
        rows.append(
            Row(
                name,
                metric,
                metric == headline,
                (*(estimate(m) if m else None for m in own), *quoted),
                (*(_change(own[0], m) if i else None for i, m in enumerate(own)), *([None] * len(known))),
            )
        )
    return rows


def _quoted(value: float) -> Estimate:
    return Estimate(value, value, value, 0)


def _change(first: Metric | None, later: Metric | None) -> Change | None:
    if first is None or later is None:
        return None
    try:
        return Change(difference(first, later))
    except ValueError:
        return None


def _flips(name: str, run: int, first: Sequence[Marked], later: Sequence[Marked]) -> Flips:
    before = {line.id: line for line in first}
    gained: list[Flip] = []
    lost: list[Flip] = []
    for line in later:
        other = before.get(line.id)
        if other is None or other.score is None or line.score is None or other.score == line.score:
            continue
        flip = Flip(line.id, line.truth, (other.answer, line.answer), (other.score, line.score))
        (gained if line.score > other.score else lost).append(flip)
    return Flips(name, run, tuple(gained), tuple(lost), sign_test(len(gained), len(lost)))


def _notes(name: str, found: Sequence[Mapping[str, Any] | None], labels: Sequence[str]) -> list[str]:
    notes = [
        f"{name}: {label} has no scores" for scores, label in zip(found, labels, strict=True) if not scores
    ]
    present = [scores for scores in found if scores]
    for setting in _SETTINGS:
        values = [scores[setting] for scores in present]
        if any(value != values[0] for value in values):
            what = "the questions" if setting == "digest" else f"{setting} ({', '.join(map(str, values))})"
            notes.append(f"{name}: the runs differ in {what}; the difference is not the model's alone")
    judges = [_judged_by(scores) for scores in present]
    if any(judge != judges[0] for judge in judges):
        notes.append(f"{name}: judged by {' and by '.join(judges)}; not comparable")
    return notes


def _judged_by(scores: Mapping[str, Any]) -> str:
    judge = scores.get("judge")
    if not judge:
        return "rules alone"
    runs = f" in {judge['runs']} runs" if judge.get("runs", 1) > 1 else ""
    return f"{' and '.join(judge['answered']) or judge['asked']}{runs}"
