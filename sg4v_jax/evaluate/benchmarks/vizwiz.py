"""VizWiz: questions that blind people asked about their photographs (Gurari et al. 2018)."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import SHORT_ANSWER, Benchmark, Mark, Marked, Sample
from sg4v_jax.evaluate.files import find, json_lines, read_json, records, write_json
from sg4v_jax.evaluate.vqa_accuracy import evalai_answer, vqa_accuracy

_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_ORIGIN = "Annotations.zip of vizwiz.org/tasks-and-datasets/vqa"
_PREPARED = ("share4v_test.jsonl", "llava_test.jsonl")


class VizWiz(Benchmark):
    """The test split, which a server scores."""

    name, title = "vizwiz", "VizWiz test"
    folders = ("vizwiz", "VizWiz")
    server = "EvalAI challenge 1911"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        path = find(root, (*_PREPARED, "test.json", "Annotations/test.json"), _ORIGIN)
        if path.suffix == ".json":
            return read_official(path, "test")
        problems: list[str] = []
        lines = json_lines(path, ("question_id", "image", "text"), problems)
        samples = [
            Sample(
                str(line["question_id"]),
                line["text"],
                f"test/{line['image']}",
                None,
                {"image": line["image"]},
            )
            for _, line in lines
        ]
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark(evalai_answer(answer), None)

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The list of images and answers that the server takes."""
        answers = [{"image": line.fields["image"], "answer": line.parsed} for line in marked]
        return [write_json(folder / "vizwiz_test.json", answers)]


class VizWizVal(VizWiz):
    """The validation split, whose answers are public."""

    name, title = "vizwiz-val", "VizWiz val"
    server = ""

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        return read_official(find(root, ("val.json", "Annotations/val.json"), _ORIGIN), "val")

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark(evalai_answer(answer), vqa_accuracy(answer, sample.truth))

    def submit(self, *_: object) -> list[pathlib.Path]:
        """Nothing: the answers are public."""
        return []


def read_official(path: pathlib.Path, split: str) -> tuple[list[Sample], list[str]]:
    """Samples of an official file; their ids count from 0, as in LLaVA's files."""
    problems: list[str] = []
    samples = []
    for index, line in records(read_json(path, list), ("image", "question"), path.name, problems):
        people = [answer["answer"] for answer in line.get("answers", [])]
        if split == "val" and not people:
            problems.append(f"{path.name}: record {index}: no answers")
            continue
        samples.append(
            Sample(
                id=str(index),
                question=line["question"] + _UNANSWERABLE + SHORT_ANSWER,
                image=f"{split}/{line['image']}",
                truth=people or None,
                fields={"image": line["image"], "category": line.get("answer_type")},
            )
        )
    return samples, problems
