"""Scores captions and answers against scenes, fact by fact."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sg4v_jax.world.describe import RELATIONS, relation
from sg4v_jax.world.scene import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
)

ATTRIBUTES = (
    *("position", "shape", "color", "size", "texture"),
    *("relation", "background", "pattern"),
)


class Fact(NamedTuple):
    """One checkable statement.

    Attributes:
      subject: A position, which holds one thing at most; a shape for relations, or "scene" for the
        background's colour and pattern. What is said of a thing can thus be right in part.
      attribute: One of `ATTRIBUTES`.
      value: The word that the attribute has; for position the subject again, and for relation
        the phrase with the other shape, for example "below the ring".
    """

    subject: str
    attribute: str
    value: str


def facts(scene: Scene) -> frozenset[Fact]:
    """Lists what a complete caption of a scene states.

    Relations are those between consecutive things in reading order, as `describe.dense`
    gives them; a caption that relates other pairs gains nothing by it.

    Args:
      scene: The scene.

    Returns:
      Its facts, equal to `parse(dense(scene))`.
    """
    found = {
        Fact("scene", "background", scene.background),
        Fact("scene", "pattern", scene.pattern),
    }
    for thing in scene.things:
        for name in ("position", "shape", "color", "size", "texture"):
            found.add(Fact(thing.position, name, getattr(thing, name)))
    for first, second in zip(scene.things, scene.things[1:], strict=False):
        found.add(_relation_fact(second.shape, relation(second, first), first.shape))
    return frozenset(found)


def _either(words: Iterable[str]) -> str:
    """A group that matches any of the words, the longest first ("top left" before "top")."""
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + r")\b"


_WORDS = {
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(TEXTURES, "texture"),
}
_THING = re.compile(rf"\bat the {_either(POSITIONS)} is an? ((?:{_either(_WORDS)} )*){_either(SHAPES)}")
_RELATION = re.compile(rf"\b{_either(SHAPES)} is {_either(RELATIONS)} the {_either(SHAPES)}")
_BACKGROUND = re.compile(rf"\bbackground is {_either(BACKGROUNDS)}|\b{_either(BACKGROUNDS)} background")
_PATTERN = re.compile(rf"\bbackground is \w+ and {_either(PATTERNS)}")


def parse(text: str) -> frozenset[Fact]:
    """Reads the facts that a caption states, as far as it follows the captions' grammar.

    Args:
      text: Any text: a caption of either kind, or what a model made of one. A thing described
        twice in different words yields both readings, at most one of which is right.

    Returns:
      The facts; none if nothing was understood.
    """
    words = " ".join(text.lower().split())
    found = set()
    for match in _THING.finditer(words):
        position = match[1]
        found.update({Fact(position, "position", position), Fact(position, "shape", match[4])})
        found.update(Fact(position, _WORDS[word], word) for word in match[2].split())
    for match in _RELATION.finditer(words):
        found.add(_relation_fact(match[1], match[2], match[3]))
    for match in _BACKGROUND.finditer(words):
        found.add(Fact("scene", "background", match[1] or match[2]))
    for match in _PATTERN.finditer(words):
        found.add(Fact("scene", "pattern", match[1]))
    return frozenset(found)


def _relation_fact(subject: str, phrase: str, other: str) -> Fact:
    """Writes "A above B" and "B below A" as the same fact, told of what is lower or righter."""
    if phrase.startswith("above") or phrase == "to the left of":
        subject, phrase, other = other, RELATIONS[phrase], subject
    return Fact(subject, "relation", f"{phrase} the {other}")


@dataclasses.dataclass(frozen=True)
class Score:
    """Counts of facts and what follows from them.

    Attributes:
      hits: Stated facts that are true (an average, hence a float, for the deranged baseline).
      stated: Facts stated.
      true: Facts that should have been stated.
    """

    hits: float
    stated: int
    true: int

    @property
    def precision(self) -> float:
        """The share of the stated facts that are true."""
        return self.hits / self.stated if self.stated else 0.0

    @property
    def recall(self) -> float:
        """The share of the true facts that are stated."""
        return self.hits / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return 2 * self.hits / (self.stated + self.true) if self.hits else 0.0


@dataclasses.dataclass(frozen=True)
class F1Report:
    """Micro-averaged scores: over all facts, and per attribute."""

    overall: Score
    per_attribute: Mapping[str, Score]

    @property
    def f1(self) -> float:
        """The overall F1."""
        return self.overall.f1

    def table(self) -> str:
        """Returns the scores as aligned text, one line per attribute."""
        lines = [f"{'attribute':<12}{'precision':>10}{'recall':>10}{'f1':>10}{'facts':>8}"]
        for name, score in (*self.per_attribute.items(), ("overall", self.overall)):
            shares = "".join(f"{x:>10.3f}" for x in (score.precision, score.recall, score.f1))
            lines.append(f"{name:<12}{shares}{score.true:>8}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class BlindReport:
    """What a captioner that ignores the image can reach.

    Attributes:
      winner: "deranged" or "constant", whichever has the higher overall F1.
      deranged: The captions, each scored against all the other scenes.
      constant: The best single training caption, given for every scene.
      caption: That caption.
    """

    winner: str
    deranged: F1Report
    constant: F1Report
    caption: str

    @property
    def report(self) -> F1Report:
        """The winner's report."""
        return self.constant if self.winner == "constant" else self.deranged

    @property
    def f1(self) -> float:
        """The winner's overall F1."""
        return self.report.f1

    def table(self) -> str:
        """Returns the winner's table under a line that names both baselines."""
        names = f"deranged {self.deranged.f1:.3f}, constant {self.constant.f1:.3f}"
        return f"blind baseline: {self.winner} ({names})\n{self.report.table()}"


def attribute_f1(captions: Sequence[str], scenes: Sequence[Scene]) -> F1Report:
    """Scores captions by the facts they state.

    Args:
      captions: One caption per scene.
      scenes: What the captions are about.

    Returns:
      Precision, recall and F1 over all facts of all scenes, and per attribute.

    Raises:
      ValueError: The lengths differ, or there are none.
    """
    _same_length(captions, scenes)
    stated, true = [parse(caption) for caption in captions], [facts(scene) for scene in scenes]
    hits = Counter(fact for pair in zip(stated, true, strict=True) for fact in pair[0] & pair[1])
    return _report(hits, _count(stated), _count(true))


def blind_f1(
    training_captions: Sequence[str],
    captions: Sequence[str],
    scenes: Sequence[Scene],
    *,
    sample: int = 1000,
) -> BlindReport:
    """Scores the two best ways of captioning without looking.

    The first knows how captions are distributed: the captions are scored against the wrong
    scenes. The result is exact, the mean over all cyclic shifts but the true one. The second
    says the same about every scene.

    Args:
      training_captions: Where the constant caption is sought; at most `sample` of them, evenly
        spaced, are tried.
      captions: One caption per scene, from the captioner that is being judged.
      scenes: What the captions are about; at least two.
      sample: How many training captions to try.

    Returns:
      Both baselines, and which of them scores higher.

    Raises:
      ValueError: The lengths differ, there are fewer than two scenes or no training captions.
    """
    _same_length(captions, scenes)
    if len(scenes) < 2 or not training_captions or sample < 1:
        raise ValueError("the blind baseline needs two scenes and one training caption")
    stated, true = [parse(caption) for caption in captions], [facts(scene) for scene in scenes]
    said, held = _count(stated), _count(true)

    # Over all pairs (i, j), a fact is right said[fact] * held[fact] times; i = j doesn't count.
    hits = {fact: float(times * held[fact]) for fact, times in said.items() if fact in held}
    for pair in zip(stated, true, strict=True):
        for fact in pair[0] & pair[1]:
            hits[fact] -= 1
    mean = {fact: count / (len(scenes) - 1) for fact, count in hits.items()}
    deranged = _report(mean, said, held)

    constant, caption = None, ""
    step = -(-len(training_captions) // sample)
    for candidate in dict.fromkeys(training_captions[::step]):
        same = parse(candidate)
        repeated = Counter(dict.fromkeys(same, len(scenes)))
        report = _report({fact: held[fact] for fact in same}, repeated, held)
        if constant is None or report.f1 > constant.f1:
            constant, caption = report, candidate
    assert constant is not None
    winner = "constant" if constant.f1 > deranged.f1 else "deranged"
    return BlindReport(winner, deranged, constant, caption)


@dataclasses.dataclass(frozen=True)
class AccuracyReport:
    """Shares of right answers: over all questions, and per category."""

    overall: float
    per_category: Mapping[str, float]

    def table(self) -> str:
        """Returns the shares as aligned text, one line per category."""
        rows = (*self.per_category.items(), ("overall", self.overall))
        return "\n".join(f"{name:<12}{share:>8.3f}" for name, share in rows)


def answer_accuracy(
    predictions: Sequence[str], answers: Sequence[str], categories: Sequence[str] | None = None
) -> AccuracyReport:
    """Scores short answers by exact match, ignoring case, outer spaces and a final period.

    This is the world's own measure. The official scorers of the public benchmarks, which
    normalise differently, are in `sg4v_jax.evaluate`.

    Args:
      predictions: What the model answered.
      answers: The right answers, in the same order.
      categories: Each question's category; without it only the overall share is given.

    Returns:
      The shares of right answers, between 0 and 1, categories in order of appearance.

    Raises:
      ValueError: The lengths differ, or there are none.
    """
    groups = ["all"] * len(answers) if categories is None else categories
    _same_length(predictions, answers)
    _same_length(groups, answers)
    right = [_plain(p) == _plain(a) for p, a in zip(predictions, answers, strict=True)]
    asked = Counter(groups)
    hits = Counter(group for group, hit in zip(groups, right, strict=True) if hit)
    per_category = {group: hits[group] / asked[group] for group in asked}
    return AccuracyReport(sum(right) / len(right), {} if categories is None else per_category)


def _plain(answer: str) -> str:
    return answer.strip().lower().removesuffix(".").strip()


def _same_length(left: Sequence[object], right: Sequence[object]) -> None:
    if not right or len(left) != len(right):
        raise ValueError(f"{len(left)} given for {len(right)}; need one for each, and at least one")


def _count(collections: Iterable[Iterable[Fact]]) -> Counter[Fact]:
    return Counter(fact for collection in collections for fact in collection)


def _report(hits: Mapping[Fact, float], stated: Counter[Fact], true: Counter[Fact]) -> F1Report:
    def score(attribute: str | None) -> Score:
        right, said, held = (
            sum(n for fact, n in counts.items() if attribute in (None, fact.attribute))
            for counts in (hits, stated, true)
        )
        return Score(right, int(said), int(held))

    return F1Report(score(None), {attribute: score(attribute) for attribute in ATTRIBUTES})
