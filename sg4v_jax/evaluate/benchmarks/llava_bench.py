"""LLaVA-Bench in the wild: GPT-4 rates an answer beside GPT-4's own (Liu et al. 2023)."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import Mark, Marked, Metric, Sample, Term
from sg4v_jax.evaluate.files import find, json_lines, write_lines
from sg4v_jax.evaluate.judge import Question
from sg4v_jax.evaluate.judged import JudgedBenchmark

_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
# The rule is part of the benchmark (llava/eval/table/rule.json of haotian-liu/LLaVA, Apache-2.0).
_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the "
    "user question displayed above. The user asks the question on observing an image. For your reference, "
    "the visual content in the image is represented with a few sentences describing the image. \nPlease "
    "rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant "
    "receives an overall score on a scale of 1 to 10, where a higher score indicates better overall "
    "performance.\nPlease first output a single line containing only two values indicating the scores for "
    "Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn the subsequent line, "
    "please provide a comprehensive explanation of your evaluation, avoiding any potential bias and "
    "ensuring that the order in which the responses were presented does not affect your judgment."
)
_ORIGIN = "liuhaotian/llava-bench-in-the-wild on Hugging Face"
_BEST = 10.0


class LLaVABench(JudgedBenchmark):
    """The sum of the model's ratings in per cent of that of the reference's, 60 questions."""

    name, title = "llava-bench", "LLaVA-Bench (in the wild)"
    folders = ("llava-bench-in-the-wild", "llava-bench")
    max_new_tokens = 1024
    aspect = "square"
    judge_model = "gpt-4-0314"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        nested = root / "resources" if (root / "resources").is_dir() else root
        prefix = "resources/" if nested != root else ""
        problems: list[str] = []
        contexts = {}
        for _, line in json_lines(find(nested, ("context.jsonl",), _ORIGIN), ("image", "caption"), problems):
            caption = line["caption"]
            contexts[line["image"]] = "\n".join(caption) if isinstance(caption, list) else caption
        reference = find(nested, ("answers_gpt4.jsonl",), _ORIGIN)
        answers = {
            line["question_id"]: line["text"]
            for _, line in json_lines(reference, ("question_id", "text"), problems)
        }
        questions = find(nested, ("questions.jsonl",), _ORIGIN)
        samples = []
        for number, line in json_lines(questions, ("question_id", "image", "text", "category"), problems):
            if line["image"] not in contexts or line["question_id"] not in answers:
                what = "context of its image" if line["image"] not in contexts else "reference answer"
                problems.append(f"{questions.name}:{number}: no {what}")
                continue
            samples.append(
                Sample(
                    id=str(line["question_id"]),
                    question=line["text"],
                    image=f"{prefix}images/{line['image']}",
                    truth=answers[line["question_id"]],
                    fields={
                        "category": line["category"].removeprefix("llava_bench_"),
                        "context": contexts[line["image"]],
                    },
                )
            )
        return samples, problems

    def question(self, sample: Sample, answer: str, attempt: int) -> Question:
        text = (
            f"[Context]\n{sample.fields['context']}\n\n[Question]\n{sample.question}\n\n"
            f"[Assistant 1]\n{sample.truth}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{_RULE}\n\n"
        )
        messages = ({"role": "system", "content": _SYSTEM}, {"role": "user", "content": text})
        return Question(messages, 1024, 0.2)

    def read_verdict(self, sample: Sample, text: str) -> Mark | None:
        """Two numbers on the first line: the reference's and the model's. The parsed mark keeps both."""
        words = text.split("\n")[0].replace(",", " ").split(" ")
        try:
            reference, model = map(float, words)
        except ValueError:
            return None
        return Mark(f"{reference:g} {model:g}", model / _BEST)

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        rated = [line for line in marked if line.score is not None]
        if not rated:
            return ()
        names = sorted({line.fields["category"] for line in rated})
        return (
            _relative("all", rated),
            *(_relative(name, [line for line in rated if line.fields["category"] == name]) for name in names),
        )

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The answers as eval_gpt_review_bench.py reads them, and the reviews as it writes them."""
        lines: list[dict[str, object]] = [
            {
                "question_id": int(x.id) if x.id.isdigit() else x.id,
                "answer_id": x.id,
                "text": x.answer,
                "metadata": {},
            }
            for x in marked
        ]
        written = [write_lines(folder / "llava_bench_answers.jsonl", lines)]
        if all(x.verdicts for x in marked):
            reviews = (_review(number, x) for number, x in enumerate(marked, start=1))
            written.append(write_lines(folder / "reviews_llava_bench.jsonl", reviews))
        return written


def _review(number: int, line: Marked) -> dict[str, object]:
    """A line that summarize_gpt_review.py reads."""
    return {
        "id": number,
        "question_id": int(line.id) if line.id.isdigit() else line.id,
        "answer1_id": line.id,
        "answer2_id": line.id,
        "category": f"llava_bench_{line.fields['category']}",
        "content": line.verdicts[0]["text"],
        "tuple": [float(word) for word in line.parsed.split(" ")],
    }


def _relative(name: str, rated: Sequence[Marked]) -> Metric:
    ratings = {line.id: tuple(map(float, line.parsed.split(" "))) for line in rated}
    model = {id_: pair[1] for id_, pair in ratings.items()}
    reference = {id_: pair[0] for id_, pair in ratings.items()}
    return Metric(name, (Term(100.0, model, reference),))
