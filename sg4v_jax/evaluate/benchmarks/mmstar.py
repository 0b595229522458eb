"""MMStar: multiple choice that can't be answered without the image (Chen et al. 2024)."""

import pathlib
from collections.abc import Mapping, Sequence

from sg4v_jax.evaluate.benchmark import Marked, Metric, Sample, by_category
from sg4v_jax.evaluate.benchmarks.mmbench import MMBench


class MMStar(MMBench):
    """1,500 questions in six categories, each asked once; its score is the mean over all."""

    name, title = "mmstar", "MMStar"
    folders = ("mmstar", "MMStar")
    files = ("MMStar.tsv",)
    origin = "VLMEvalKit (opencompass.openxlab.space/utils/VLMEval/MMStar.tsv)"

    def sample(self, row: Mapping[str, str | None], image: bytes) -> Sample:
        """A row as a question; nothing is a rotation."""
        sample = super().sample(row, image)
        fields = {
            "question": row["question"],
            "category": row.get("category"),
            "l2-category": row.get("l2_category"),
        }
        return Sample(**{**vars(sample), "fields": fields})

    def metrics(self, marked: Sequence[Marked]) -> tuple[Metric, ...]:
        return by_category("accuracy", marked)

    def submit(self, *_: object) -> list[pathlib.Path]:
        """Nothing: the answers are public."""
        return []
