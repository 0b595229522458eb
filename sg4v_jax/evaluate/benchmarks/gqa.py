"""GQA: compositional questions about scene graphs (Hudson & Manning 2019), balanced test-dev."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import SHORT_ANSWER, Benchmark, Mark, Marked, Metric, Sample, by_category
from sg4v_jax.evaluate.files import find, lacks, read_json, write_json


class GQA(Benchmark):
    """The answer has to be the same text, but for case and full stops at its end."""

    name, title = "gqa", "GQA"
    folders = ("gqa", "GQA")

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        file = "testdev_balanced_questions.json"
        path = find(
            root, (f"data/{file}", file, f"data/questions1.2/{file}"), "cs.stanford.edu, GQA questions1.2"
        )
        images = (
            "images" if (root / "images").is_dir() or not (root / "data/images").is_dir() else "data/images"
        )
        samples: list[Sample] = []
        problems: list[str] = []
        for id_, line in read_json(path, dict).items():
            if complaint := lacks(line, ("question", "imageId", "answer")):
                problems.append(f"{path.name}: question {id_}: {complaint}")
                continue
            structural = (line.get("types") or {}).get("structural")
            samples.append(
                Sample(
                    id=id_,
                    question=line["question"] + SHORT_ANSWER,
                    image=f"{images}/{line['imageId']}.jpg",
                    truth=line["answer"],
                    fields={"category": structural, "kind": "open" if structural == "query" else "binary"},
                )
            )
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        parsed = answer.rstrip(".").lower()
        return Mark(parsed, float(parsed == sample.truth))

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        return (*by_category("accuracy", marked), *by_category("accuracy", marked, "kind")[1:])

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The predictions that the official eval.py takes."""
        predictions = [{"questionId": line.id, "prediction": line.parsed} for line in marked]
        return [write_json(folder / "testdev_balanced_predictions.json", predictions)]
