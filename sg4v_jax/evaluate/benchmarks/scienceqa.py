"""ScienceQA, whose questions with an image make the published number (Lu et al. 2022)."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from sg4v_jax.data.records import IMAGE_PLACEHOLDER
from sg4v_jax.evaluate.benchmark import LETTER_ANSWER, LETTERS, Benchmark, Mark, Marked, Metric, Sample, mean
from sg4v_jax.evaluate.choices import lettered
from sg4v_jax.evaluate.files import find, lacks, read_json

_OPTIONS = LETTERS[:5]
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
# LLaVA's and ShareGPT4V's question files; the same texts are made from the problems without them.
_QUESTIONS = ("share4v_test_CQM-A.json", "llava_test_CQM-A.json")


class ScienceQA(Benchmark):
    """4,241 problems of the test split, text-only ones among them."""

    name, title = "scienceqa", "ScienceQA-IMG"
    folders = ("scienceqa", "ScienceQA")
    max_new_tokens = 1024
    aspect = "square"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        origin = "data/scienceqa of the ScienceQA repository"
        problems_file = read_json(find(root, ("problems.json",), origin), dict)
        split = read_json(find(root, ("pid_splits.json",), origin), dict)["test"]
        prepared = self._prepared(root)
        samples: list[Sample] = []
        complaints: list[str] = []
        for id_ in split:
            problem = problems_file.get(id_)
            if complaint := lacks(problem, ("question", "choices", "answer")):
                complaints.append(f"problems.json: problem {id_}: {complaint}")
                continue
            choices = tuple(problem["choices"])
            samples.append(
                Sample(
                    id=id_,
                    question=prepared.get(id_, _text(problem) + lettered(choices)) + LETTER_ANSWER,
                    image=f"images/test/{id_}/{problem['image']}" if problem.get("image") else None,
                    truth=LETTERS[problem["answer"]],
                    fields={"has_image": bool(problem.get("image")), "category": problem.get("subject")},
                    choices=choices,
                    stem=_text(problem),
                )
            )
        return samples, complaints

    def _prepared(self, root: pathlib.Path) -> dict[str, str]:
        for name in _QUESTIONS:
            if (root / name).exists():
                return {
                    line["id"]: line["conversations"][0]["value"].replace(IMAGE_PLACEHOLDER, "").strip()
                    for line in read_json(root / name, list)
                }
        return {}

    def mark(self, sample: Sample, answer: str) -> Mark:
        parsed = parse(answer)
        valid = parsed in _OPTIONS[: len(sample.choices)]
        return Mark(parsed, float(valid and parsed == sample.truth))

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        with_image = [line for line in marked if line.fields["has_image"]]
        subjects = sorted({line.fields["category"] for line in marked if line.fields["category"]})
        return (
            mean("accuracy with image", with_image),
            mean("accuracy", marked),
            *(mean(f"accuracy: {s}", [m for m in marked if m.fields["category"] == s]) for s in subjects),
        )


def parse(answer: str) -> str:
    """The letter that an answer gives: alone, before ". ", or in one sentence "The answer is X."; or ""."""
    if len(answer) == 1 and answer in _OPTIONS:
        return answer
    if answer[:1] and answer[0] in _OPTIONS and answer[1:3] == ". ":
        return answer[0]
    found = _SENTENCE.findall(answer)
    return found[0] if len(found) == 1 else ""


def _text(problem: dict[str, Any]) -> str:
    hint = (problem.get("hint") or "").strip()
    return f"Context: {hint}\n{problem['question']}" if hint else problem["question"]
