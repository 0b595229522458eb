"""Captioning in COCO's format: CIDEr and BLEU against people's captions (COCO, Flickr30k, NoCaps)."""

import pathlib
from collections.abc import Sequence

from sg4v_jax.evaluate.benchmark import Benchmark, Mark, Marked, Metric, Sample, Term
from sg4v_jax.evaluate.caption_scores import MAX_N, bleu, bleu_counts, cider, words
from sg4v_jax.evaluate.files import find, read_json, records, write_json


class Captioning(Benchmark):
    """One sentence about each image."""

    name, title = "caption", "captioning"
    folders = ("caption", "coco_caption", "flickr30k", "nocaps")

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        names = ("annotations.json", "captions_val2014.json", "captions_val2017.json")
        path = find(root, names, "COCO's annotations, or any file in that format")
        content = read_json(path, dict)
        problems: list[str] = []
        people: dict[object, list[str]] = {}
        for _, line in records(
            content.get("annotations", []), ("image_id", "caption"), f"{path.name}: annotations", problems
        ):
            people.setdefault(line["image_id"], []).append(line["caption"])
        samples = []
        for _, line in records(
            content.get("images", []), ("id", "file_name"), f"{path.name}: images", problems
        ):
            if line["id"] not in people:
                problems.append(f"{path.name}: image {line['id']} has no caption")
                continue
            samples.append(
                Sample(
                    id=str(line["id"]),
                    question="Provide a one-sentence caption for the provided image.",
                    image=f"images/{line['file_name']}",
                    truth=people[line["id"]],
                    fields={"image_id": line["id"]},
                )
            )
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        raise AssertionError("captions are marked together: n-grams count by how rare they are")

    def marks(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Mark]:
        scores = cider(answers, [sample.truth for sample in samples])
        return [Mark(" ".join(words(answer)), score) for answer, score in zip(answers, scores, strict=True)]

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        ones = {line.id: 1.0 for line in marked}
        score = Metric("CIDEr", (Term(100.0, {x.id: x.score or 0.0 for x in marked}, ones),), 1000.0)
        counts = {line.id: bleu_counts(line.answer, line.truth) for line in marked}
        precisions = [
            Term(
                1.0,
                {i: float(c[0][n]) for i, c in counts.items()},
                {i: float(c[1][n]) for i, c in counts.items()},
            )
            for n in range(MAX_N)
        ]
        lengths = Term(
            1.0, {i: float(c[2]) for i, c in counts.items()}, {i: float(c[3]) for i, c in counts.items()}
        )
        return (
            score,
            *(Metric(f"BLEU-{n}", (*precisions[:n], lengths), combine=bleu) for n in range(1, MAX_N + 1)),
        )

    def submit(
        self, marked: Sequence[Marked], folder: pathlib.Path, root: pathlib.Path
    ) -> list[pathlib.Path]:
        """COCO's format of results."""
        results = [{"image_id": line.fields["image_id"], "caption": line.answer} for line in marked]
        return [write_json(folder / "captions_results.json", results)]
