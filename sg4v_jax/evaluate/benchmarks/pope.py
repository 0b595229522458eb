"""POPE: is there a ... in the image? Three ways to choose what isn't (Li et al. 2023)."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import SHORT_ANSWER, Benchmark, Mark, Marked, Metric, Sample, Term
from sg4v_jax.evaluate.files import find, json_lines

CATEGORIES = ("random", "popular", "adversarial")


class POPE(Benchmark):
    """F1 of "yes", averaged over the three ways."""

    name, title = "pope", "POPE"
    folders = ("pope", "POPE")

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        samples: list[Sample] = []
        problems: list[str] = []
        for category in CATEGORIES:
            file = f"coco_pope_{category}.json"
            path = find(root, (f"coco/{file}", file), "output/coco of the POPE repository")
            for _, line in json_lines(path, ("question_id", "image", "text", "label"), problems):
                samples.append(
                    Sample(
                        id=f"{category}/{line['question_id']}",
                        question=line["text"] + SHORT_ANSWER,
                        image=f"val2014/{line['image']}",
                        truth=line["label"],
                        fields={"category": category, "image": line["image"]},
                    )
                )
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        parsed = parse(answer)
        return Mark(parsed, float(parsed == sample.truth))

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        parts = {
            category: [line for line in marked if line.fields["category"] == category]
            for category in CATEGORIES
        }
        parts = {category: lines for category, lines in parts.items() if lines}
        mean_f1 = Metric("F1", tuple(_f1(lines, 100.0 / len(parts)) for lines in parts.values()))
        detailed = [
            Metric(f"{name}: {category}", (term,))
            for category, lines in parts.items()
            for name, term in {
                "F1": _f1(lines, 100.0),
                "accuracy": _ratio(lines, "right", "all"),
                "precision": _ratio(lines, "true yes", "said yes"),
                "recall": _ratio(lines, "true yes", "is yes"),
                "said yes": _ratio(lines, "said yes", "all"),
            }.items()
        ]
        return (mean_f1, *detailed)


def parse(answer: str) -> str:
    """ "no" if the first sentence has the word No, no or not; else "yes" (eval_pope.py)."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _counts(line: Marked) -> dict[str, float]:
    said, true = line.parsed == "yes", line.truth == "yes"
    return {
        "all": 1.0,
        "right": line.score or 0.0,  # A question without an answer is never right.
        "said yes": float(said),
        "is yes": float(true),
        "true yes": float(said and true),
    }


def _sum(lines: Sequence[Marked], weights: dict[str, float]) -> dict[str, float]:
    """A weighted sum of counts for each image: the six questions about one are not independent."""
    sums: dict[str, float] = {}
    for line in lines:
        counts = _counts(line)
        value = sum(weight * counts[name] for name, weight in weights.items())
        sums[line.fields["image"]] = sums.get(line.fields["image"], 0.0) + value
    return sums


def _ratio(lines: Sequence[Marked], numerator: str, denominator: str) -> Term:
    return Term(100.0, _sum(lines, {numerator: 1.0}), _sum(lines, {denominator: 1.0}))


def _f1(lines: Sequence[Marked], scale: float) -> Term:
    return Term(scale, _sum(lines, {"true yes": 2.0}), _sum(lines, {"said yes": 1.0, "is yes": 1.0}))
