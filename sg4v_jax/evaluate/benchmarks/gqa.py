"""GQA: compositional questions about scene graphs (Hudson & Manning 2019), balanced test-dev.

All that its eval.py prints, but for grounding, which is for models whose attention is on regions.
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sg4v_jax.evaluate.benchmark import SHORT_ANSWER, Benchmark, Mark, Marked, Metric, Sample, Term, mean
from sg4v_jax.evaluate.files import find, lacks, read_json, write_json

_TIER = "testdev"
_FOLDERS = ("data", "", "data/questions1.2", "questions1.2", "questions")
_ORIGIN = "cs.stanford.edu/people/dorarad/gqa/download.html, questions1.2"
# Operations of a question's program that are no step of reasoning.
_NO_STEPS = ("exist", "query: name", "choose name")
# Answers that fit a question by this rule, whatever the choices file says.
_COMMON = ("color", "material", "shape")
_SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}


class GQA(Benchmark):
    """The answer has to be the same text, but for case and full stops at its end."""

    name, title = "gqa", "GQA"
    folders = ("gqa", "GQA")
    questions: ClassVar[str] = f"{_TIER}_balanced_questions.json"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        path = find(root, [f"{folder}/{self.questions}".lstrip("/") for folder in _FOLDERS], _ORIGIN)
        places = ("images", "data/images", "allImages/images")
        images = next((place for place in places if (root / place).is_dir()), places[0])
        choices = _choices(root)
        samples: list[Sample] = []
        problems: list[str] = []
        for id_, line in read_json(path, dict).items():
            if complaint := lacks(line, ("question", "imageId", "answer")):
                problems.append(f"{path.name}: question {id_}: {complaint}")
                continue
            samples.append(
                Sample(
                    id=id_,
                    question=line["question"] + SHORT_ANSWER,
                    image=f"{images}/{line['imageId']}.jpg",
                    truth=line["answer"],
                    fields=_fields(id_, line, choices),
                )
            )
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        parsed = answer.rstrip(".").lower()
        return Mark(parsed, float(parsed == sample.truth))

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        balanced = [line for line in marked if line.fields.get("balanced", True)]
        return (
            mean("accuracy", balanced),
            *_parts("", balanced, "kind"),
            *(_share(name, balanced, name) for name in ("validity", "plausibility")),
            _consistency(marked),
            *_parts("structural type: ", balanced, "category"),
            *_parts("semantic type: ", balanced, "semantic"),
            *_parts("steps: ", balanced, "steps"),
            *_parts("words: ", balanced, "words"),
        )

    def details(self, marked: Sequence[Marked]) -> Mapping[str, Any]:
        """How far the answers' distribution is from the right one (chi-square); lower is better."""
        distance = _distribution([line for line in marked if line.fields.get("balanced", True)])
        return {} if distance is None else {"distribution": distance}

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The predictions that the official eval.py takes."""
        predictions = [{"questionId": line.id, "prediction": line.parsed} for line in marked]
        return [
            write_json(
                folder / f"{self.questions.removesuffix('questions.json')}predictions.json", predictions
            )
        ]


class GQAConsistency(GQA):
    """All questions of test-dev, fourteen times as many: who answers one should answer those it entails."""

    name, title = "gqa-consistency", "GQA consistency"
    headline = "consistency"
    questions = f"{_TIER}_all_questions.json"


def _choices(root: pathlib.Path) -> Mapping[str, Any]:
    """Valid and plausible answers by question, from a file that not every release has."""
    for folder in (*_FOLDERS, "data/eval", "eval"):
        if (root / folder / f"{_TIER}_choices.json").exists():
            found: Mapping[str, Any] = read_json(root / folder / f"{_TIER}_choices.json", dict)
            return found
    return {}


def _fields(id_: str, line: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """What eval.py looks at in a question."""
    types, program = line.get("types") or {}, line.get("semantic")
    structural = types.get("structural")
    fields: dict[str, Any] = {
        "category": structural,
        "kind": "open" if structural == "query" else "binary",
        "semantic": _SEMANTIC.get(types.get("semantic", ""), types.get("semantic")),
        "words": len(line["question"].split()),
        "balanced": line.get("isBalanced", True),
        "group": (line.get("groups") or {}).get("global"),
    }
    if program is not None:
        steps = [f"{step.get('operation')}: {step.get('argument')}" for step in program]
        fields["steps"] = sum(not any(word in step for word in _NO_STEPS) for step in steps)
    if others := [other for other in line.get("entailed") or () if other != id_]:
        fields["entails"] = others
    if id_ in choices:
        common = "Common" in (types.get("detailed") or "")
        for name, key in (("validity", "valid"), ("plausibility", "plausible")):
            fields[name] = list(_COMMON) if common else choices[id_][key]
    return fields


def _parts(prefix: str, marked: Sequence[Marked], field: str) -> list[Metric]:
    """The accuracy of each kind of question."""
    parts: dict[Any, list[Marked]] = {}
    for line in marked:
        if line.fields.get(field) is not None:
            parts.setdefault(line.fields[field], []).append(line)
    return [mean(f"{prefix}{part}", parts[part]) for part in sorted(parts)]


def _share(name: str, marked: Sequence[Marked], field: str) -> Metric:
    """How many answers are among those that a field lists."""
    fits = {line.id: float(line.parsed in line.fields[field]) for line in marked if field in line.fields}
    return Metric(name, (Term(100.0, fits, dict.fromkeys(fits, 1.0)),))


def _consistency(marked: Sequence[Marked]) -> Metric:
    """Of the balanced questions that were answered rightly: the accuracy on those that each entails.

    Where an entailed question was not asked, as with the balanced ones alone, there is no such number.
    """
    scores = {line.id: line.score or 0.0 for line in marked}
    shares: dict[str, float] = {}
    for line in marked:
        entailed = line.fields.get("entails", ())
        if line.fields.get("balanced", True) and entailed and line.score:
            if not all(id_ in scores for id_ in entailed):
                return Metric("consistency", (Term(100.0, {}, {}),))
            shares[line.id] = sum(scores[id_] for id_ in entailed) / len(entailed)
    return Metric("consistency", (Term(100.0, shares, dict.fromkeys(shares, 1.0)),))


def _distribution(marked: Sequence[Marked]) -> float | None:
    """Chi-square of given against right answers, averaged over groups of questions by their size."""
    grouped = [line for line in marked if line.fields.get("group") is not None]
    if not grouped:
        return None
    sizes = collections.Counter(line.fields["group"] for line in grouped)
    right = collections.Counter((line.fields["group"], line.truth) for line in grouped)
    given = collections.Counter((line.fields["group"], line.parsed) for line in grouped)
    weighted = sum(sizes[key[0]] * (given[key] - count) ** 2 / count for key, count in right.items())
    return weighted / len(grouped) / 100
