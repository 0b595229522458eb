"""From a benchmark's files to its scores: answer, mark, measure, and write everything down."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sg4v_jax.data.conversation import get_template, place_images, render
from sg4v_jax.evaluate.answering import (
    Answers,
    Entry,
    Progress,
    answer_samples,
    prompt_of,
    read_answers,
)
from sg4v_jax.evaluate.benchmark import Benchmark, Loaded, Mark, Marked, Metric, Sample
from sg4v_jax.evaluate.files import read_json, write_json, write_lines
from sg4v_jax.evaluate.judge import Judge
from sg4v_jax.evaluate.judged import JudgedBenchmark
from sg4v_jax.evaluate.settings import Choices, Settings
from sg4v_jax.evaluate.statistics import estimate

SAMPLES, SCORES = "samples.jsonl", "scores.json"
_SHOWN_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a benchmark.

    Attributes:
      settings: how it was run.
      folder: where everything is.
      asked: samples asked in this call.
      missing: samples that other shards still have to answer; no scores before that.
      scores: what `scores.json` holds; empty while samples are missing, or not `scored`.
    """

    settings: Settings
    folder: pathlib.Path
    asked: int
    missing: int
    scores: Mapping[str, Any]


def run_benchmark(
    benchmark: Benchmark,
    engine: Answers,
    loaded: Loaded,
    output: str | os.PathLike[str],
    *,
    model: str,
    choices: Choices | None = None,
    shard: tuple[int, int] | None = (0, 1),
    judge: Judge | None = None,
    scored: bool = True,
    progress: Progress = iter,
) -> Report:
    """Runs a benchmark, or goes on with it; scores it when every sample has an answer or an error.

    Args:
      benchmark: from `registry`.
      engine: the model.
      loaded: its samples, from `Benchmark.load`.
      output: directory of the run; the benchmark gets a folder in it.
      model: the model's name, for the records.
      choices: what is not to be as published.
      shard: (index, count), for several processes with the same output; None asks nothing more.
      judge: who judges open answers; None leaves them without a score.
      scored: False leaves scoring to another call, when all processes have answered.
      progress: wraps the iteration over answers.

    Raises:
      ValueError: the output holds another run, or the mode doesn't suit the benchmark.
    """
    choices = choices or Choices()
    samples = loaded.samples[: choices.limit or None]
    settings = choices.settings(benchmark, model, samples)
    folder = pathlib.Path(output) / benchmark.name
    settings.claim(folder)
    asked = 0
    if shard:
        asked = answer_samples(engine, loaded, samples, settings, folder, shard=shard, progress=progress)
    entries = read_answers(folder)
    missing = sum(sample.id not in entries for sample in samples)
    if missing or not scored:
        return Report(settings, folder, asked, missing, {})
    scores = score(benchmark, loaded, samples, entries, settings, folder, judge)
    return Report(settings, folder, asked, 0, scores)


def score(
    benchmark: Benchmark,
    loaded: Loaded,
    samples: Sequence[Sample],
    entries: Mapping[str, Entry],
    settings: Settings,
    folder: pathlib.Path,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Marks all answers and writes `samples.jsonl`, `scores.json` and what a server takes.

    Returns:
      What `scores.json` holds.
    """
    failed = {sample.id: entries[sample.id]["error"] for sample in samples if entries[sample.id]["error"]}
    marks, judged = _marks(benchmark, samples, entries, failed, judge)
    marked = [
        Marked(s.id, s.truth, s.fields, entries[s.id]["text"], mark.parsed, mark.score, mark.verdicts)
        for s, mark in zip(samples, marks, strict=True)
    ]
    write_lines(
        folder / SAMPLES,
        (
            _line(sample, line, entries[sample.id], settings)
            for sample, line in zip(samples, marked, strict=True)
        ),
    )
    files, problems = _submit(benchmark, marked, folder, loaded)
    metrics = [metric for metric in benchmark.metrics(marked) if metric.measured]
    result = {
        "title": benchmark.title,
        **dataclasses.asdict(settings),
        "decoding": "greedy" if settings.mode == "generate" else "likelihood of each option",
        "first_prompt": _prompt_as_seen(samples[0], settings),
        "headline": (benchmark.headline or metrics[0].name) if metrics else "",
        "metrics": {metric.name: _numbers(metric) for metric in metrics},
        "details": benchmark.details(marked) if metrics else {},
        "not_scored": "" if metrics else _not_scored(benchmark, judge),
        "without_answer": len(failed),
        "unreadable": sum(not m.parsed and m.score == 0 and m.id not in failed for m in marked),
        "cut_off": sum(entries[sample.id].get("stop") == "length" for sample in samples),
        "unusable_records": len(loaded.problems),
        "problems": [*(f"{id_}: {error}" for id_, error in failed.items()), *loaded.problems, *problems],
        "submission": [path.relative_to(folder).as_posix() for path in files],
        "server": benchmark.server,
        **judged,
    }
    write_json(folder / SCORES, result, indent=1)
    return result


def read_samples(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl`: a run's questions, prompts, answers and marks.

    Raises:
      FileNotFoundError: the run has none yet.
    """
    path = folder / SAMPLES
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; finish the run first")
    return [json.loads(line) for line in filter(None, path.read_text(encoding="utf-8").split("\n"))]


def read_marked(folder: pathlib.Path) -> list[Marked]:
    """The marked samples of a run.

    Raises:
      FileNotFoundError: the run has none yet.
    """
    names = [field.name for field in dataclasses.fields(Marked)]
    return [Marked(**{name: line[name] for name in names if name in line}) for line in read_samples(folder)]


def read_scores(output: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What each benchmark of a run scored, by name."""
    return {path.parent.name: read_json(path, dict) for path in sorted(output.glob(f"*/{SCORES}"))}


def summary(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The headline of each benchmark with its interval, and what is wrong, as text."""
    lines = [
        f"{'benchmark':<26}{'metric':<24}{'score':>9}  {'95 % interval':<19}{'samples':>8}{'no answer':>11}"
    ]
    notes = []
    for name, found in scores.items():
        headline = found["headline"]
        counts = f"{found['samples']:>8}{found['without_answer']:>11}"
        metric = found["metrics"].get(headline, {})
        if metric.get("value") is not None:
            interval = f"{metric['low']:.2f} to {metric['high']:.2f}"
            lines.append(
                f"{found['title']:<26}{headline[:22]:<24}{metric['value']:>9.2f}  {interval:<19}{counts}"
            )
        else:
            lines.append(f"{found['title']:<26}{'not scored':<24}{'':>9}  {'':<19}{counts}")
            notes.append(f"{name}: {found['not_scored'] or 'nothing to divide by'}")
        if found["unreadable"]:
            without = f" ({found['without_judge']})" if found.get("without_judge") else ""
            notes.append(
                f"{name}: {found['unreadable']} answers that couldn't be read; they count as wrong{without}"
            )
        if found.get("details"):
            notes.append(f"{name}: {', '.join(f'{k} {_shown(v)}' for k, v in found['details'].items())}")
        if found["problems"]:
            notes.append(f"{name}: {len(found['problems'])} problems, the first: {found['problems'][0]}")
        notes += [f"{name}: submit {file}" for file in found["submission"] if found["server"]]
    return "\n".join([*lines, *notes])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _marks(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    entries: Mapping[str, Entry],
    failed: Mapping[str, str],
    judge: Judge | None,
) -> tuple[list[Mark], dict[str, Any]]:
    """(marks, what to say of the judge). Without an answer nothing is right."""
    answers = [entries[sample.id]["text"] for sample in samples]
    marks = benchmark.marks(samples, answers)
    for i, sample in enumerate(samples):
        if sample.id in failed:
            marks[i] = Mark("", None if marks[i].score is None else 0.0)
    if not isinstance(benchmark, JudgedBenchmark):
        return marks, {}
    if judge is None:
        return marks, {"without_judge": benchmark.without_judge}
    open_ = [
        i
        for i, (sample, mark) in enumerate(zip(samples, marks, strict=True))
        if not mark.parsed and sample.id not in failed and sample.truth is not None
    ]
    judgement = benchmark.judge(judge, [samples[i] for i in open_], [answers[i] for i in open_])
    for i, verdict in zip(open_, judgement.marks, strict=True):
        marks[i] = verdict or marks[i]
    return marks, {
        "judge": {
            "asked": judge.model,
            "answered": sorted(judgement.models),
            "published_with": benchmark.judge_model,
            "answers": len(open_),
            "runs": benchmark.runs_with(judge),
            "without_verdict": len(judgement.reasons),
            "reasons": dict(list(judgement.reasons.items())[:_SHOWN_PROBLEMS]),
        }
    }


def _not_scored(benchmark: Benchmark, judge: Judge | None) -> str:
    if benchmark.judged:
        return "no verdict could be read" if judge else "needs a judge (--judge)"
    return (
        f"the truth is not public; submit the file to {benchmark.server}"
        if benchmark.server
        else "no truth given"
    )


def _numbers(metric: Metric) -> dict[str, float | None]:
    """Value and interval; None for what is no number (a ratio of nothing), as JSON has none for it."""
    numbers = {**dataclasses.asdict(estimate(metric)), "maximum": metric.maximum}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _submit(
    benchmark: Benchmark, marked: Sequence[Marked], folder: pathlib.Path, loaded: Loaded
) -> tuple[list[pathlib.Path], list[str]]:
    """(files, problems): scores are not lost because a submission can't be written."""
    try:
        return benchmark.submit(marked, folder / "submission", loaded.root), []
    except (OSError, ValueError) as error:
        return [], [f"no submission file: {error}"]


def _line(sample: Sample, marked: Marked, entry: Entry, settings: Settings) -> dict[str, Any]:
    """A line of `samples.jsonl`: the question and the prompt as seen, the answer and what was made of it."""
    return {
        **dataclasses.asdict(marked),
        "image": _reference(sample.image),
        "question": sample.question,
        "prompt": _prompt_as_seen(sample, settings),
        **{name: value for name, value in entry.items() if name not in ("id", "text")},
    }


def _prompt_as_seen(sample: Sample, settings: Settings) -> str:
    turns = prompt_of(sample, settings, ()).turns
    if sample.image is not None:
        turns = place_images(turns, as_asked=True)
    return render(get_template(settings.template), turns)


def _reference(image: str | bytes | None) -> str | None:
    """The path of an image; of one that lies in a table, its digest."""
    return f"sha256:{hashlib.sha256(image).hexdigest()}" if isinstance(image, bytes) else image
