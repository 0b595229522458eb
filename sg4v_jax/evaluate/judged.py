"""Benchmarks whose answers a language model judges."""

import abc
import pathlib
from collections.abc import Sequence
from typing import ClassVar

from sg4v_jax.evaluate.benchmark import Benchmark, Mark, Sample
from sg4v_jax.evaluate.judge import Judge, Question


class JudgedBenchmark(Benchmark):
    """Has no scores before a judge was asked.

    Attributes:
      judge_model: whom the published numbers are from.
      attempts: how often an unreadable verdict is asked for.
    """

    judged = True
    judge_model: ClassVar[str]
    attempts: ClassVar[int] = 1

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark("", None)

    @abc.abstractmethod
    def question(self, sample: Sample, answer: str, attempt: int) -> Question:
        """What to ask the judge about an answer; attempts count from 0."""

    @abc.abstractmethod
    def read_verdict(self, text: str) -> Mark | None:
        """The mark that a verdict gives; None if it can't be read."""

    def judge(
        self, judge: Judge, samples: Sequence[Sample], answers: Sequence[str]
    ) -> tuple[list[Mark], dict[str, str], set[str]]:
        """Asks for verdicts on all answers.

        Returns:
          (marks, why some have no score by sample id, the names of the models that judged).
        """
        marks = [Mark("", None)] * len(samples)
        reasons: dict[str, str] = {}
        models: set[str] = set()
        left = list(range(len(samples)))
        for attempt in range(self.attempts):
            asked = [self.question(samples[i], answers[i], attempt) for i in left]
            unread = []
            for i, verdict in zip(left, judge.ask(asked), strict=True):
                mark = None if verdict.error else self.read_verdict(verdict.text)
                if verdict.error:
                    reasons[samples[i].id] = verdict.error
                elif mark is None:
                    unread.append(i)
                    reasons[samples[i].id] = f"unreadable verdict: {verdict.text[:200]!r}"
                else:
                    marks[i] = mark
                    reasons.pop(samples[i].id, None)
                    models.add(verdict.model)
            left = unread
        return marks, reasons, models


def verdict_cache(folder: pathlib.Path) -> pathlib.Path:
    """Where the verdicts of a run are kept."""
    return folder / "verdicts.jsonl"
