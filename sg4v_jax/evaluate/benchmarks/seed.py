"""SEED-Bench, its image part: multiple choice in nine dimensions (Li et al. 2023)."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import LETTER_ANSWER, LETTERS, Benchmark, Mark, Marked, Sample
from sg4v_jax.evaluate.choices import lettered
from sg4v_jax.evaluate.files import find, read_json, records, write_lines

_KEYS = ("question_id", "question", "data_id", "data_type", "question_type_id", "answer")
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class SEED(Benchmark):
    """An answer is right if it is the letter and nothing else."""

    name, title = "seed", "SEED-Bench (image)"
    folders = ("seed_bench", "seed", "SEED-Bench")

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        path = find(root, ("SEED-Bench.json",), "AILab-CVC/SEED-Bench on Hugging Face")
        content = read_json(path, dict)
        names = {number: name for name, number in content.get("question_type", {}).items()}
        samples: list[Sample] = []
        problems: list[str] = []
        for _, line in records(content.get("questions", []), (*_KEYS, *_CHOICES), path.name, problems):
            if line["data_type"] != "image":
                continue
            choices = tuple(line[key] for key in _CHOICES)
            samples.append(
                Sample(
                    id=str(line["question_id"]),
                    question=line["question"] + lettered(choices) + LETTER_ANSWER,
                    image=f"SEED-Bench-image/{line['data_id']}",
                    truth=line["answer"],
                    fields={"category": names.get(line["question_type_id"], str(line["question_type_id"]))},
                    choices=choices,
                    stem=line["question"],
                )
            )
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark(answer if answer in LETTERS[:4] else "", float(answer == sample.truth))

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """JSON lines as the leaderboard takes them."""
        lines = ({"question_id": line.id, "prediction": line.parsed} for line in marked)
        return [write_lines(folder / "seed_bench_image.jsonl", lines)]
