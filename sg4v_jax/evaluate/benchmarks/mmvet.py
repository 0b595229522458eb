"""MM-Vet: open questions that need several capabilities at once, graded by GPT-4 (Yu et al. 2023)."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import Mark, Marked, Metric, Sample, mean
from sg4v_jax.evaluate.files import find, lacks, read_json, write_json
from sg4v_jax.evaluate.judge import Question
from sg4v_jax.evaluate.judged import JudgedBenchmark

_ICELAND = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries "
    "Iceland and Greenland are misleading. Despite its name, Iceland is known for its beautiful green "
    "landscapes, while Greenland is mostly covered in ice and snow. The meme is saying that the person has "
    "trust issues because the names of these countries do not accurately represent their landscapes. | "
)
# The grader's prompt is part of the benchmark (mm-vet_evaluator.py of yuweihao/MM-Vet, Apache-2.0): with
# another one the scores would not be MM-Vet's.
_PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the "
    "prediction. <AND> in the ground truth means it is totally right only when all elements in the ground "
    "truth are present in the prediction, and <OR> means it is totally right when any one element in the "
    "ground truth is present in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, "
    "0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of the "
    "correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{_ICELAND}The meme talks about Iceland and Greenland. It's pointing out that despite their names, "
    "Iceland is not very icy and Greenland isn't very green. | 0.4\n"
    f"{_ICELAND}The meme is using humor to point out the misleading nature of Iceland's and Greenland's "
    "names. Iceland, despite its name, has lush green landscapes while Greenland is mostly covered in ice "
    "and snow. The text 'This is why I have trust issues' is a playful way to suggest that these "
    "contradictions can lead to distrust or confusion. The humor in this meme is derived from the "
    "unexpected contrast between the names of the countries and their actual physical characteristics. | "
    "1.0\n"
)
_AGAIN = "\nPredict the correctness of the answer (digit): "


class MMVet(JudgedBenchmark):
    """218 questions; the mean of the grades, overall and by capability."""

    name, title = "mmvet", "MM-Vet"
    folders = ("mm-vet", "mmvet", "MM-Vet")
    max_new_tokens = 1024
    aspect = "square"
    judge_model = "gpt-4-0613"
    attempts = 6

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        nested = root / "resources" if (root / "resources").is_dir() else root
        path = find(nested, ("mm-vet.json",), "mm-vet.zip of the MM-Vet repository's release v1")
        prefix = "resources/" if nested != root else ""
        samples: list[Sample] = []
        problems: list[str] = []
        for id_, line in read_json(path, dict).items():
            if complaint := lacks(line, ("imagename", "question", "answer", "capability")):
                problems.append(f"{path.name}: {id_}: {complaint}")
                continue
            samples.append(
                Sample(
                    id=id_,
                    question=line["question"],
                    image=f"{prefix}images/{line['imagename']}",
                    truth=line["answer"],
                    fields={"capabilities": line["capability"]},
                )
            )
        return samples, problems

    def question(self, sample: Sample, answer: str, attempt: int) -> Question:
        truth = sample.truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        text = f"{_PROMPT}\n" + " | ".join([sample.question, truth, answer, ""])
        message = {"role": "user", "content": text + (_AGAIN if attempt else "")}
        # The first time again is asked at the same temperature, with other words.
        return Question((message,), 3, 0.5 * max(0, attempt - 1))

    def read_verdict(self, text: str) -> Mark | None:
        first = text.split(" ")[0].strip()
        try:
            grade = float(first)
        except ValueError:
            return None
        return Mark(first, grade) if 0 <= grade <= 1 else None

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        graded = [line for line in marked if line.score is not None]
        if not graded:
            return ()
        names = sorted({name for line in graded for name in line.fields["capabilities"]})
        parts = [mean(name, [x for x in graded if name in x.fields["capabilities"]]) for name in names]
        return (mean("total", graded), *parts)

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The answers by id, as the official grader takes them."""
        return [write_json(folder / "mm-vet.json", {line.id: line.answer for line in marked}, indent=4)]
