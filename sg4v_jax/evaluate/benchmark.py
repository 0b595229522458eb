"""What a benchmark is: where its samples come from, how they are asked, and how answers are scored.

A benchmark reads the official files, asks with the published prompt, and marks each answer by itself;
its metrics are sums of ratios of sums over units, so that one bootstrap serves all of them.
"""

import abc
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FIRST_IMAGES = 50


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question.

    Attributes:
      id: unique within the benchmark.
      question: what the model is asked, without the image's placeholder.
      image: the file's path relative to the benchmark's folder, its bytes, or None for a text-only question.
      truth: what is right, as it goes into the journal of samples: JSON.
      fields: whatever else the scorer needs (category, group): JSON.
      choices: the options of a multiple-choice question, in order; empty for others.
      stem: a multiple-choice question without its options, for ranking the options' texts.
    """

    id: str
    question: str
    image: str | bytes | None
    truth: Any = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple[str, ...] = ()
    stem: str = ""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What the official files hold.

    Attributes:
      samples: all that can be asked, in the files' order.
      problems: one line for each record that can't, naming file and record.
      root: what image paths are relative to.
    """

    samples: tuple[Sample, ...]
    problems: tuple[str, ...]
    root: pathlib.Path

    def require_images(self, name: str) -> None:
        """Makes sure, before a model is loaded, that the images were not forgotten.

        Raises:
          FileNotFoundError: none of the first ones is there.
        """
        images = [sample.image for sample in self.samples if isinstance(sample.image, str)][:_FIRST_IMAGES]
        if images and not any((self.root / image).exists() for image in images):
            raise FileNotFoundError(
                f"{self.root / images[0]}: not there, nor are the images after it; {name}'s belong in that "
                "folder (docs/evaluation.md)"
            )


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a scorer made of an answer.

    Attributes:
      parsed: how it was understood; "" if it wasn't.
      score: between 0 and 1 as a rule, or None if only a server or a judge can say.
      verdicts: what a judge said (`text`) and who that was (`model`), for each time it was asked.
    """

    parsed: str
    score: float | None
    verdicts: tuple[Mapping[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Marked:
    """A sample with its mark: a line of `samples.jsonl`, and all that metrics are made of."""

    id: str
    truth: Any
    fields: Mapping[str, Any]
    answer: str
    parsed: str
    score: float | None
    verdicts: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Term:
    """scale * sum(numerator) / sum(denominator), each a number for every unit."""

    scale: float
    numerator: Mapping[str, float]
    denominator: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A function of ratios, as a rule their weighted sum.

    Attributes:
      name: the published name.
      terms: the ratios; units (images, groups of rotations, questions) are what a bootstrap draws.
      maximum: the best that can be reached.
      combine: takes the arrays of ratios, each with an element for every draw; None adds them, each
        times its scale.
    """

    name: str
    terms: tuple[Term, ...]
    maximum: float = 100.0
    combine: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None

    @property
    def measured(self) -> bool:
        """Whether there is any unit."""
        return any(term.denominator for term in self.terms)

    def combined(self, ratios: Sequence[np.ndarray]) -> np.ndarray:
        """The metric's values, given those of its terms' ratios."""
        if self.combine:
            return self.combine(ratios)
        parts = [term.scale * ratio for term, ratio in zip(self.terms, ratios, strict=True)]
        return np.sum(parts, axis=0)


class Benchmark(abc.ABC):
    """One benchmark. Subclasses are instantiated once, in `registry`.

    Attributes:
      name: on the command line.
      title: in tables.
      folders: where its files are below `--data`, the first that exists.
      headline: the metric that tables quote; empty: the first.
      max_new_tokens: as in the published scripts.
      template: conversation template, as in the published scripts.
      aspect: image preprocessing, as in the published scripts.
      judged: whether there are no scores without a judge.
      server: who scores, if the truth is not public.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    headline: ClassVar[str] = ""
    max_new_tokens: ClassVar[int] = 128
    template: ClassVar[str] = "v1"
    aspect: ClassVar[str] = "pad"
    judged: ClassVar[bool] = False
    server: ClassVar[str] = ""

    @abc.abstractmethod
    def read(self, root: pathlib.Path) -> tuple[Iterable[Sample], Iterable[str]]:
        """(samples, problems) of the official files below `root`.

        Raises:
          FileNotFoundError: a file that has to be there isn't; says which, and where it is had.
        """

    @abc.abstractmethod
    def mark(self, sample: Sample, answer: str) -> Mark:
        """Scores one answer by the official rule."""

    def marks(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Mark]:
        """The marks of all answers; for benchmarks that can't mark one by itself."""
        return [self.mark(sample, answer) for sample, answer in zip(samples, answers, strict=True)]

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        """The published metrics, the headline first. By default the mean score, overall and by category."""
        return by_category("accuracy", marked)

    def details(self, marked: Sequence[Marked]) -> Mapping[str, Any]:
        """What the official tool prints that is no function of ratios, and so has no interval."""
        return {}

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """Writes the files that the official server or tool takes; none by default."""
        return []

    def load(self, data: str | os.PathLike[str]) -> Loaded:
        """Reads the samples below the data directory.

        Raises:
          FileNotFoundError: there is no folder of this benchmark, or a file is missing in it.
          ValueError: two samples have the same id, or there is none.
        """
        root = self.root(pathlib.Path(data))
        found, complaints = self.read(root)
        samples, problems = tuple(found), tuple(complaints)
        ids = {sample.id for sample in samples}
        if len(ids) != len(samples):
            raise ValueError(f"{root}: {len(samples)} samples of {self.name}, but {len(ids)} ids")
        if not samples:
            raise ValueError(f"{root}: no sample of {self.name}; {'; '.join(problems[:3])}")
        return Loaded(samples, problems, root)

    def root(self, data: pathlib.Path) -> pathlib.Path:
        """The benchmark's folder below the data directory.

        Raises:
          FileNotFoundError: there is none.
        """
        for folder in self.folders:
            if (data / folder).is_dir():
                return data / folder
        raise FileNotFoundError(
            f"{data}: no folder {' or '.join(self.folders)} for {self.name}; see docs/evaluation.md"
        )


def mean(name: str, marked: Sequence[Marked], *, unit: Callable[[Marked], str] | None = None) -> Metric:
    """100 times the mean of the scores; samples without a score are left out."""
    scored = [line for line in marked if line.score is not None]
    numerator: dict[str, float] = {}
    denominator: dict[str, float] = {}
    for line in scored:
        key = unit(line) if unit else line.id
        numerator[key] = numerator.get(key, 0.0) + (line.score or 0.0)
        denominator[key] = denominator.get(key, 0.0) + 1
    return Metric(name, (Term(100.0, numerator, denominator),))


def by_category(name: str, marked: Sequence[Marked], field: str = "category") -> tuple[Metric, ...]:
    """The mean of all, then that of each category, in the order of the alphabet; none without a score."""
    if all(line.score is None for line in marked):
        return ()
    names = sorted({str(line.fields[field]) for line in marked if line.fields.get(field) is not None})
    parts = [[line for line in marked if str(line.fields.get(field)) == category] for category in names]
    metrics = [mean(f"{name}: {category}", part) for category, part in zip(names, parts, strict=True)]
    return (mean(name, marked), *metrics)
