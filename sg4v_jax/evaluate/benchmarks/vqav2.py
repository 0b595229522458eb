"""VQAv2: open questions about COCO images (Goyal et al. 2017)."""

import pathlib
from collections.abc import Sequence
from typing import Any

from sg4v_jax.evaluate.benchmark import SHORT_ANSWER, Benchmark, Mark, Marked, Sample
from sg4v_jax.evaluate.files import find, json_lines, read_json, records, write_json
from sg4v_jax.evaluate.vqa_accuracy import evalai_answer, vqa_accuracy

_ORIGIN = "visualqa.org/download.html"
_TEST_DEV = (
    *("share4v_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test-dev2015.jsonl"),
    "v2_OpenEnded_mscoco_test-dev2015_questions.json",
)
_TEST = (
    *("share4v_vqav2_mscoco_test2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"),
    "v2_OpenEnded_mscoco_test2015_questions.json",
)


class VQAv2(Benchmark):
    """Test-dev, which a server scores."""

    name, title = "vqav2", "VQAv2 test-dev"
    folders = ("vqav2", "VQAv2")
    server = "EvalAI challenge 830"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        problems: list[str] = []
        questions = read_questions(find(root, _TEST_DEV, _ORIGIN), "test2015", problems)
        return [Sample(str(id_), text, image) for id_, text, image in questions], problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark(evalai_answer(answer), None)

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The server wants all of the test split; what isn't in test-dev gets an empty answer.

        Raises:
          FileNotFoundError: the file of all test questions isn't there.
        """
        parsed = {line.id: line.parsed for line in marked}
        questions = read_questions(find(root, _TEST, _ORIGIN), "test2015", [])
        answers = [{"question_id": id_, "answer": parsed.get(str(id_), "")} for id_, _, _ in questions]
        return [write_json(folder / "vqav2_test-dev.json", answers)]


class VQAv2Val(VQAv2):
    """The validation split, whose answers are public."""

    name, title = "vqav2-val", "VQAv2 val"
    server = ""

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        problems: list[str] = []
        file = find(root, ("v2_mscoco_val2014_annotations.json",), _ORIGIN)
        people: dict[str, dict[str, Any]] = {
            str(entry["question_id"]): entry
            for _, entry in records(
                read_json(file, dict)["annotations"], ("question_id", "answers"), file.name, problems
            )
        }
        path = find(root, ("v2_OpenEnded_mscoco_val2014_questions.json",), _ORIGIN)
        samples = []
        for id_, text, image in read_questions(path, "val2014", problems):
            entry = people.get(str(id_))
            if entry is None:
                problems.append(f"{file.name}: question {id_} has no answers")
                continue
            truth = [answer["answer"] for answer in entry["answers"]]
            samples.append(Sample(str(id_), text, image, truth, {"category": entry.get("answer_type")}))
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark(evalai_answer(answer), vqa_accuracy(answer, sample.truth))

    def submit(self, *_: object) -> list[pathlib.Path]:
        """Nothing: the answers are public."""
        return []


def read_questions(path: pathlib.Path, split: str, problems: list[str]) -> list[tuple[Any, str, str]]:
    """(id, text, image) of a question file, LLaVA's or the official one; image ids become file names."""
    if path.suffix == ".jsonl":
        lines = json_lines(path, ("question_id", "image", "text"), problems)
        return [(line["question_id"], line["text"], f"{split}/{line['image']}") for _, line in lines]
    entries = records(
        read_json(path, dict)["questions"], ("question_id", "image_id", "question"), path.name, problems
    )
    return [
        (
            entry["question_id"],
            entry["question"] + SHORT_ANSWER,
            f"{split}/COCO_{split}_{entry['image_id']:012d}.jpg",
        )
        for _, entry in entries
    ]
