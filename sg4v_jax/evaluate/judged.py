"""Benchmarks whose answers a language model judges: all of them, or those that rules can't read."""

import abc
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sg4v_jax.evaluate.benchmark import Benchmark, Mark, Sample
from sg4v_jax.evaluate.judge import Judge, Question


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a judge made of answers.

    Attributes:
      marks: of each answer; None where a verdict is missing.
      reasons: why, by sample id.
      models: who judged, by the endpoint's word.
    """

    marks: Sequence[Mark | None]
    reasons: Mapping[str, str]
    models: frozenset[str]


class JudgedBenchmark(Benchmark):
    """A judge marks the answers that `mark` leaves unparsed: all, unless it is overridden.

    Attributes:
      judge_model: whom the published numbers are from.
      attempts: how often an unreadable verdict is asked for.
      runs: how often each answer is judged, as published.
      without_judge: what becomes of those answers without a judge.
    """

    judged = True
    judge_model: ClassVar[str]
    attempts: ClassVar[int] = 1
    runs: ClassVar[int] = 1
    without_judge: ClassVar[str] = "not scored"

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark("", None)

    @abc.abstractmethod
    def question(self, sample: Sample, answer: str, attempt: int) -> Question:
        """What to ask the judge about an answer; attempts count from 0."""

    @abc.abstractmethod
    def read_verdict(self, sample: Sample, text: str) -> Mark | None:
        """The mark that a verdict gives; None if it can't be read."""

    def runs_with(self, judge: Judge) -> int:
        """How often a judge marks each answer: more than once only where the official tool does."""
        return (judge.runs or self.runs) if self.runs > 1 else 1

    def merge(self, marks: Sequence[Mark]) -> Mark:
        """One mark of those of all runs: their words side by side, and the mean of their scores."""
        if len(marks) == 1:
            return marks[0]
        scores = [mark.score or 0.0 for mark in marks]
        verdicts = tuple(verdict for mark in marks for verdict in mark.verdicts)
        return Mark(" ".join(mark.parsed for mark in marks), sum(scores) / len(scores), verdicts)

    def judge(self, judge: Judge, samples: Sequence[Sample], answers: Sequence[str]) -> Judgement:
        """Asks for verdicts on all answers, as many times as there are runs.

        A mark needs a verdict of each run: after the first that is missing no more are asked for.
        """
        given: list[list[Mark]] = [[] for _ in samples]
        reasons: dict[str, str] = {}
        models: set[str] = set()
        for run in range(self.runs_with(judge)):
            left = [i for i, marks in enumerate(given) if len(marks) == run]
            found = self._run(judge, [samples[i] for i in left], [answers[i] for i in left], run)
            for i, mark in zip(left, found.marks, strict=True):
                given[i] += [mark] if mark else []
            reasons |= found.reasons
            models |= found.models
        marks = [
            None if sample.id in reasons else self.merge(g) for sample, g in zip(samples, given, strict=True)
        ]
        return Judgement(marks, reasons, frozenset(models))

    def _run(self, judge: Judge, samples: Sequence[Sample], answers: Sequence[str], run: int) -> Judgement:
        marks: list[Mark | None] = [None] * len(samples)
        reasons: dict[str, str] = {}
        models: set[str] = set()
        left = list(range(len(samples)))
        for attempt in range(self.attempts):
            asked = [self.question(samples[i], answers[i], attempt) for i in left]
            asked = [dataclasses.replace(q, repeat=q.repeat + run * self.attempts) for q in asked]
            unread = []
            for i, verdict in zip(left, judge.ask(asked), strict=True):
                mark = None if verdict.error else self.read_verdict(samples[i], verdict.text)
                if verdict.error:
                    reasons[samples[i].id] = verdict.error
                elif mark is None:
                    unread.append(i)
                    reasons[samples[i].id] = f"unreadable verdict: {verdict.text[:200]!r}"
                else:
                    said = ({"model": verdict.model, "text": verdict.text},)
                    marks[i] = dataclasses.replace(mark, verdicts=said)
                    reasons.pop(samples[i].id, None)
                    models.add(verdict.model)
            left = unread
        return Judgement(marks, reasons, frozenset(models))


def verdict_cache(folder: pathlib.Path) -> pathlib.Path:
    """Where the verdicts of a run are kept."""
    return folder / "verdicts.jsonl"
