"""What a run of the demo found: as a page, as JSON and as lines on the terminal."""

import dataclasses
import json
import os
import pathlib
import textwrap
from typing import Any

from sg4v_jax.demo import report_html
from sg4v_jax.demo.marking import bracketed
from sg4v_jax.page.terminal import printable
from sg4v_jax.world import AccuracyReport, BlindReport, F1Report, Scene, Score, dense

PAGE, NUMBERS = "report.html", "report.json"
COLUMNS = ("blind", "captioner", "pretrain")  # of the F1 table
_SAMPLES = 3  # captions on the terminal: the first ones, not chosen


@dataclasses.dataclass
class Report:
    """Everything that is reported of a run.

    Attributes:
      images: PNG files of the held-out scenes.
      scenes: what they show.
      captions: by stage, one caption per scene.
      f1: by stage, the score of these captions.
      blind: what a captioner that ignores the image can reach.
      accuracy: right answers to the held-out questions.
      majority: accuracy of each category's most frequent answer.
      questions: dicts of image, question, answer (the model's) and truth, grouped by image in the
        order of `images`.
      curves: by stage, the lines of its `metrics.jsonl`.
      photos: (image file, caption) of photographs that the captioner was trained on.
      reload_equal: whether the model exported to Hugging Face's format loads back the same.
      times: seconds by stage.
    """

    images: list[bytes]
    scenes: list[Scene]
    captions: dict[str, list[str]]
    f1: dict[str, F1Report]
    blind: BlindReport
    accuracy: AccuracyReport
    majority: float
    questions: list[dict[str, str]]
    curves: dict[str, list[dict[str, Any]]]
    photos: list[tuple[bytes, str]]
    reload_equal: bool = False
    times: dict[str, float] = dataclasses.field(default_factory=dict)

    def f1_columns(self) -> dict[str, F1Report]:
        """The columns of the F1 table by heading, the blind baseline first."""
        known = {"blind": self.blind.report, **self.f1}
        return {name: known[name] for name in COLUMNS if name in known}


def write_report(directory: str | os.PathLike[str], report: Report) -> pathlib.Path:
    """Writes `report.html` and `report.json`, and prints a summary on standard output.

    Args:
      directory: where the files go; created if need be.
      report: what to write.

    Returns:
      The path of the page: one file that needs no network and no scripts.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / NUMBERS).write_text(json.dumps(numbers(report), indent=1) + "\n", encoding="utf-8")
    page = directory / PAGE
    page.write_text(report_html.page(report), encoding="utf-8")
    print(f"{summary(report)}\n\nReport: {page}")
    return page


def numbers(report: Report) -> dict[str, Any]:
    """All numbers of a report as JSON-ready dictionaries."""
    blind = report.blind
    return {
        "heldout_images": len(report.images),
        "heldout_questions": len(report.questions),
        "caption_f1": {stage: _f1_numbers(f1) for stage, f1 in report.f1.items()},
        "blind": {
            "winner": blind.winner,
            "deranged": _f1_numbers(blind.deranged),
            "constant": _f1_numbers(blind.constant),
        },
        "accuracy": {"overall": report.accuracy.overall, **report.accuracy.per_category},
        "majority_accuracy": report.majority,
        "reload_equal": report.reload_equal,
        "seconds": report.times,
        "curves": report.curves,
    }


def summary(report: Report) -> str:
    """The run in a screenful of text."""
    parts = [_times_table(report), _f1_table(report), _accuracy_table(report), _samples(report)]
    same = "yes" if report.reload_equal else "NO"
    parts.append(f"Exported to Hugging Face LLaVA and loaded back the same: {same}")
    return "\n\n".join(["", *parts]).rstrip()


def _f1_numbers(report: F1Report) -> dict[str, Any]:
    def fields(score: Score) -> dict[str, float]:
        shares = {"precision": score.precision, "recall": score.recall, "f1": score.f1}
        return {**dataclasses.asdict(score), **shares}

    attributes = {name: fields(score) for name, score in report.per_attribute.items()}
    return {"overall": fields(report.overall), "per_attribute": attributes}


def _times_table(report: Report) -> str:
    width = max([len(title) for title in report.times], default=5) + 2
    rows = [*report.times.items(), ("total", sum(report.times.values()))]
    return "\n".join(["Stages", *(f"{title:<{width}}{seconds:>8.1f} s" for title, seconds in rows)])


def _f1_table(report: Report) -> str:
    columns = report.f1_columns()
    lines = [f"Captions of {len(report.images)} held-out images: F1 of the facts they state"]
    lines.append(" " * 12 + "".join(f"{heading:>15}" for heading in columns))
    for attribute in report.blind.report.per_attribute:
        scores = [column.per_attribute[attribute].f1 for column in columns.values()]
        lines.append(f"{attribute:<12}" + "".join(f"{score:>15.3f}" for score in scores))
    lines.append(f"{'overall':<12}" + "".join(f"{column.f1:>15.3f}" for column in columns.values()))
    return "\n".join(lines)


def _accuracy_table(report: Report) -> str:
    return "\n".join(
        [
            f"Answers to {len(report.questions)} held-out questions: share that is right",
            report.accuracy.table(),
            f"{'majority':<12}{report.majority:>8.3f}  (always each category's most frequent answer)",
        ]
    )


def _samples(report: Report) -> str:
    lines = ["The captioner's first captions; [wrong words] in brackets"]
    for caption, scene in list(zip(report.captions["captioner"], report.scenes, strict=True))[:_SAMPLES]:
        lines.append(_wrapped("caption ", printable(bracketed(caption, scene))))
        lines.append(_wrapped("truth   ", dense(scene)) + "\n")
    return "\n".join(lines).rstrip()


def _wrapped(label: str, text: str) -> str:
    return textwrap.fill(text, 100, initial_indent=f"  {label}", subsequent_indent=" " * 10)
