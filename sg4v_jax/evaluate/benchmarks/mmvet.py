"""MM-Vet: open questions that need several capabilities at once, graded by GPT-4 (Yu et al. 2023)."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sg4v_jax.evaluate.benchmark import Mark, Marked, Metric, Sample, mean
from sg4v_jax.evaluate.files import find, lacks, read_json, write_json, write_text
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
    """218 questions; the mean of the grades over five runs of the grader, overall and by capability."""

    name, title = "mmvet", "MM-Vet"
    folders = ("mm-vet", "mmvet", "MM-Vet")
    max_new_tokens = 1024
    aspect = "square"
    judge_model = "gpt-4-0613"
    attempts = 5
    runs = 5

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        names = ("mm-vet.json", "resources/mm-vet.json", "mm-vet/mm-vet.json")
        path = find(root, names, "mm-vet.zip of the MM-Vet repository's release v1")
        prefix = "" if path.parent == root else f"{path.parent.name}/"
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

    def read_verdict(self, sample: Sample, text: str) -> Mark | None:
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

    def details(self, marked: Sequence[Marked]) -> Mapping[str, Any]:
        """The total of each run, and their standard deviation: what the paper gives beside the mean."""
        totals = 100 * np.mean([_grades(line) for line in marked if line.score is not None], axis=0)
        return {"totals of the runs": totals.tolist(), "standard deviation": float(totals.std())}

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """The answers as the official grader takes them; with grades, its own files, to go on with."""
        written = [write_json(folder / "mm-vet.json", {line.id: line.answer for line in marked}, indent=4)]
        graded = [line for line in marked if line.score is not None]
        if not graded:
            return written
        judge = graded[0].verdicts[0]["model"].replace("/", "_")
        stem, runs = f"mm-vet_{judge}", f"{len(_grades(graded[0]))}runs"
        written.append(write_json(folder / f"{stem}-grade-{runs}.json", _grade_file(graded), indent=4))
        if len(graded) == len(marked):
            parts = {"cap-score": _by_capability(marked), "cap-int-score": _by_integration(marked)}
            for name, columns in parts.items():
                text = _table("mm-vet", columns, self.details(marked))
                written.append(write_text(folder / f"{stem}-{name}-{runs}.csv", text))
        return written


def _grades(line: Marked) -> list[float]:
    """The grades of all runs."""
    return [float(word) for word in line.parsed.split(" ")]


def _grade_file(graded: Sequence[Marked]) -> dict[str, dict[str, list[Any]]]:
    """What mm-vet_evaluator.py keeps; it asks for the questions that aren't in it."""
    return {
        line.id: {
            "model": [verdict["model"] for verdict in line.verdicts],
            "content": line.parsed.split(" "),
            "score": _grades(line),
        }
        for line in graded
    }


def _by_capability(marked: Sequence[Marked]) -> dict[str, list[Marked]]:
    parts: dict[str, list[Marked]] = {}
    for line in marked:
        for name in set(line.fields["capabilities"]):
            parts.setdefault(name, []).append(line)
    return parts


def _by_integration(marked: Sequence[Marked]) -> dict[str, list[Marked]]:
    """By what has to work together, named in the order of the alphabet; the official order is by chance."""
    parts: dict[str, list[Marked]] = {}
    for line in marked:
        parts.setdefault("_".join(sorted(set(line.fields["capabilities"]))), []).append(line)
    return parts


def _table(model: str, parts: Mapping[str, Sequence[Marked]], details: Mapping[str, Any]) -> str:
    """One of the grader's tables: the largest part first, one decimal."""
    names = sorted(parts, key=lambda name: (-len(parts[name]), name))
    everything = {line.id: line for part in parts.values() for line in part}.values()
    means = [100 * float(np.mean([line.score for line in part])) for part in map(parts.__getitem__, names)]
    total = 100 * float(np.mean([line.score for line in everything]))
    runs = [round(value, 1) for value in details["totals of the runs"]]
    row = [*(round(value, 1) for value in (*means, total, details["standard deviation"])), str(runs)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["", *names, "total", "std", "runs"], [model, *row]])
    return text.getvalue()
