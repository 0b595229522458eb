"""MME: pairs of yes/no questions about an image (Fu et al. 2023)."""

import pathlib
import re
from collections.abc import Iterable, Sequence

from sg4v_jax.data.folder import IMAGE_SUFFIXES
from sg4v_jax.evaluate.benchmark import SHORT_ANSWER, Benchmark, Mark, Marked, Metric, Sample, Term
from sg4v_jax.evaluate.files import find

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_RELEASES = (
    "MME_Benchmark_release_version/MME_Benchmark",
    "MME_Benchmark_release_version",
    "MME_Benchmark_release",
    "MME_Benchmark",
)
_OFFICIAL_SUFFIX = re.compile(r"\s*Please answer yes or no\.\s*$")
# The official tool looks no further.
_PREFIX = 4


class MME(Benchmark):
    """A category scores 100 acc + 100 acc+ (both questions of an image right), at most 200."""

    name, title = "mme", "MME"
    folders = ("MME", "mme")
    headline = "perception"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        release = find(root, _RELEASES, "MME's authors, on request (README of the MME repository)")
        samples: list[Sample] = []
        problems: list[str] = []
        for category in (*PERCEPTION, *COGNITION):
            folder = release / category
            if not folder.is_dir():
                problems.append(f"{release}: no folder {category}; its score is missing in the sums")
                continue
            nested = folder / "questions_answers_YN"
            images = folder / "images" if nested.is_dir() else folder
            names = {path.stem: path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
            for text in sorted((nested if nested.is_dir() else folder).glob("*.txt")):
                image = names.get(text.stem, images / f"{text.stem}.jpg")
                found = _questions(category, text, image, root)
                samples += found
                if len(found) != 2:
                    problems.append(f"{category}/{text.name}: {len(found)} questions; an image has two")
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        parsed = parse(answer)
        return Mark(parsed, float(parsed == sample.truth))

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        terms = {}
        for category in (*PERCEPTION, *COGNITION):
            lines = [line for line in marked if line.fields["category"] == category]
            if lines:
                terms[category] = _terms(lines)
        sums = [
            Metric(
                name, tuple(term for c in categories for term in terms.get(c, ())), 200.0 * len(categories)
            )
            for name, categories in (
                ("perception", PERCEPTION),
                ("cognition", COGNITION),
                ("total", PERCEPTION + COGNITION),
            )
        ]
        return (
            *(metric for metric in sums if metric.terms),
            *(Metric(category, parts, 200.0) for category, parts in terms.items()),
        )

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """A file for each category, as `eval_tool/calculation.py` reads them."""
        written = []
        for category in dict.fromkeys(line.fields["category"] for line in marked):
            path = folder / "mme_eval_tool" / f"{category}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [line for line in marked if line.fields["category"] == category]
            path.write_text("".join(map(_tool_line, lines)), encoding="utf-8")
            written.append(path)
        return written


def parse(answer: str) -> str:
    """ "yes", "no" or "other", by the first four characters (eval_tool/calculation.py)."""
    start = answer.lower()[:_PREFIX]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _questions(category: str, text: pathlib.Path, image: pathlib.Path, root: pathlib.Path) -> list[Sample]:
    found = []
    for number, line in enumerate(text.read_text(encoding="utf-8").split("\n")):
        question, tab, truth = line.rstrip().rpartition("\t")
        if tab and truth.lower() in ("yes", "no"):
            found.append(
                Sample(
                    id=f"{category}/{image.name}/{number}",
                    question=_OFFICIAL_SUFFIX.sub("", question) + SHORT_ANSWER,
                    image=image.relative_to(root).as_posix(),
                    truth=truth.lower(),
                    fields={"category": category, "image": image.name, "question": question},
                )
            )
    return found


def _terms(lines: Iterable[Marked]) -> tuple[Term, Term]:
    """Accuracy and accuracy+ of a category; the units are its images."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        scores.setdefault(f"{line.fields['category']}/{line.fields['image']}", []).append(line.score or 0.0)
    return (
        Term(
            100.0,
            {image: sum(pair) for image, pair in scores.items()},
            {image: float(len(pair)) for image, pair in scores.items()},
        ),
        Term(100.0, {image: float(all(pair)) for image, pair in scores.items()}, dict.fromkeys(scores, 1.0)),
    )


def _tool_line(line: Marked) -> str:
    answer = " ".join(line.answer.split())
    return f"{line.fields['image']}\t{line.fields['question']}\t{line.truth.capitalize()}\t{answer}\n"
