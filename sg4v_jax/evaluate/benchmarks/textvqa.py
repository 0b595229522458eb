"""TextVQA: questions about text in images (Singh et al. 2019), with and without OCR tokens in the prompt."""

import pathlib
from typing import Any, ClassVar

from sg4v_jax.evaluate.benchmark import SHORT_ANSWER, Benchmark, Mark, Sample
from sg4v_jax.evaluate.files import find, json_lines, lacks, read_json, records
from sg4v_jax.evaluate.vqa_accuracy import evalai_answer, textvqa_accuracy

OCR = "\nReference OCR token: "
_PREPARED = ("share4v_textvqa_val_v051_ocr.jsonl", "llava_textvqa_val_v051_ocr.jsonl")
_ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"
_ANSWERS = 10


class TextVQA(Benchmark):
    """The published number: the prompt lists the tokens that an OCR system read."""

    name, title = "textvqa", "TextVQA"
    folders = ("textvqa", "TextVQA")
    with_ocr: ClassVar[bool] = True

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        path = find(root, ("TextVQA_0.5.1_val.json",), "textvqa.org/dataset")
        problems: list[str] = []
        prompts = self._prompts(root, problems) if self.with_ocr else {}
        keys = ("question_id", "image_id", "question", "answers")
        samples = []
        for index, line in records(read_json(path, dict)["data"], keys, path.name, problems):
            key = (line["image_id"], line["question"].lower())
            if self.with_ocr and key not in prompts:
                problems.append(f"{path.name}: record {index}: no OCR tokens for image {line['image_id']}")
            elif len(line["answers"]) != _ANSWERS:
                problems.append(
                    f"{path.name}: record {index}: {len(line['answers'])} answers, not {_ANSWERS}"
                )
            else:
                samples.append(
                    Sample(
                        id=str(line["question_id"]),
                        question=prompts.get(key, line["question"] + SHORT_ANSWER),
                        image=f"train_images/{line['image_id']}.jpg",
                        truth=line["answers"],
                    )
                )
        return samples, problems

    def _prompts(self, root: pathlib.Path, problems: list[str]) -> dict[tuple[str, str], str]:
        """The prompt of each (image, question in lower case), as the official scorer joins them."""
        origin = "ShareGPT4V's playground.zip or LLaVA's eval.zip; or that table from textvqa.org"
        path = find(root, (*_PREPARED, _ROSETTA), origin)
        if path.suffix == ".jsonl":
            lines = json_lines(path, ("question_id", "text"), problems)
            return {(line["question_id"], _asked(line["text"])): line["text"] for _, line in lines}
        tokens: dict[str, list[str]] = {}
        for index, entry in enumerate(read_json(path, dict)["data"]):
            if complaint := lacks(entry, ("image_id", "ocr_tokens")):
                problems.append(f"{path.name}: record {index}: {complaint}")
            else:
                tokens[entry["image_id"]] = entry["ocr_tokens"]
        questions: list[dict[str, Any]] = read_json(root / "TextVQA_0.5.1_val.json", dict)["data"]
        return {
            (line["image_id"], line["question"].lower()): line["question"]
            + OCR
            + ", ".join(tokens[line["image_id"]])
            + SHORT_ANSWER
            for line in questions
            if not lacks(line, ("image_id", "question")) and line["image_id"] in tokens
        }

    def mark(self, sample: Sample, answer: str) -> Mark:
        return Mark(evalai_answer(answer), textvqa_accuracy(answer, sample.truth))


class TextVQAWithoutOCR(TextVQA):
    """The same without OCR tokens: some forty points lower for models of this kind."""

    name, title = "textvqa-no-ocr", "TextVQA without OCR tokens"
    with_ocr = False


def _asked(prompt: str) -> str:
    """The question in a prompt: its first line, or the second where the OCR tokens come first."""
    lines = prompt.split("\n")
    return lines[1 if lines[0].startswith(OCR.strip()) and len(lines) > 1 else 0].lower()
