"""The embedded world: held-out drawn scenes whose answers are known; needs no download."""

import pathlib

from sg4v_jax.evaluate.benchmark import Benchmark, Mark, Sample
from sg4v_jax.evaluate.files import json_lines
from sg4v_jax.world import WorldFiles, answer_accuracy, write_world

# Like `sg4v data world` and `sg4v demo` by default: a world with their seed has these scenes held out, too.
_SCENES, _SEED = 64, 0


class World(Benchmark):
    """Exact match, ignoring case and a final full stop. Drawn into the data directory if it isn't there."""

    name, title = "world", "embedded world"
    folders = ("world",)
    max_new_tokens = 16

    def root(self, data: pathlib.Path) -> pathlib.Path:
        """The world's folder, drawn if need be."""
        if not WorldFiles.below(data / "world").heldout_answers.exists():
            write_world(data / "world", train_scenes=2, heldout_scenes=_SCENES, seed=_SEED)
        return data / "world"

    def read(self, root: pathlib.Path) -> tuple[list[Sample], list[str]]:
        files = WorldFiles.below(root)
        problems: list[str] = []
        answers = {
            line["question_id"]: line
            for _, line in json_lines(files.heldout_answers, ("question_id", "answer"), problems)
        }
        samples = [
            Sample(
                id=str(line["question_id"]),
                question=line["text"],
                image=f"images/{line['image']}",
                truth=answers[line["question_id"]]["answer"],
                fields={"category": line.get("category")},
            )
            for _, line in json_lines(files.heldout_questions, ("question_id", "image", "text"), problems)
            if line["question_id"] in answers
        ]
        return samples, problems

    def mark(self, sample: Sample, answer: str) -> Mark:
        parsed = answer.strip().lower().removesuffix(".").strip()
        return Mark(parsed, answer_accuracy([answer], [sample.truth]).overall)
