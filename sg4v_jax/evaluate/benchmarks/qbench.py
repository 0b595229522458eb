"""Q-Bench, perception (LLVisionQA, dev): questions about how good an image is (Wu et al. 2023)."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import LETTERS, Benchmark, Mark, Marked, Sample
from sg4v_jax.evaluate.choices import lettered
from sg4v_jax.evaluate.files import find, read_json, records, write_lines


class QBench(Benchmark):
    """Asked with a template and a phrase of its own, as in the published script."""

    name, title = "qbench", "Q-Bench"
    folders = ("qbench", "Q-Bench")
    max_new_tokens = 1024
    template = "share4v_v1"
    aspect = "square"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        path = find(root, ("llvisionqa_dev.json",), "nanyangtu/LLVisionQA-QBench on Hugging Face")
        # The documentation's name has a slip that people's folders have, too.
        folder = "images_llvisionqa" if (root / "images_llvisionqa").is_dir() else "images_llviqionqa"
        problems: list[str] = []
        samples = []
        for index, line in records(
            read_json(path, list), ("img_path", "question", "candidates"), path.name, problems
        ):
            choices = tuple(line["candidates"])
            opening = f"{line['question']}\nChoose between one of the options as follows:"
            samples.append(
                Sample(
                    id=f"{index}",
                    question=f"{opening}{lettered(choices)}\n",
                    image=f"{folder}/{line['img_path']}",
                    truth=line.get("correct_ans"),
                    fields={"category": f"concern {line['concern']}" if "concern" in line else None},
                    choices=choices,
                    stem=line["question"],
                )
            )
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        options = dict(zip(LETTERS, sample.choices, strict=False))
        named = options.get(answer[:1], "")
        right = sample.truth in (named, (answer.split(" ") or [""])[0], answer)
        return Mark(answer[:1] if named else "", None if sample.truth is None else float(right))

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The records with a `response`, one on each line."""
        lines = read_json(root / "llvisionqa_dev.json", list)
        answers = {int(line.id): line.answer for line in marked}
        answered = ({**lines[index], "response": answers[index]} for index in sorted(answers))
        return [write_lines(folder / "llvisionqa_dev_answers.jsonl", answered)]
