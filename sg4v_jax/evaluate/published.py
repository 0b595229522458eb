"""Published scores, to put a run beside.

ShareGPT4V: docs/ModelZoo.md of its repository. LLaVA-1.5: the figures of the ShareGPT4V paper and, for what
they leave out (GQA, TextVQA, POPE, MMBench-CN at 13B), docs/MODEL_ZOO.md of LLaVA's repository.
"""

from collections.abc import Mapping

Scores = Mapping[tuple[str, str], float]

_COLUMNS = (
    ("llava-bench", "all"),
    ("mme", "perception"),
    ("mme", "cognition"),
    ("mmbench", "accuracy"),
    ("mmbench-cn", "accuracy"),
    ("seed", "accuracy"),
    ("mmvet", "total"),
    ("qbench", "accuracy"),
    ("scienceqa", "accuracy with image"),
    ("vqav2", "accuracy"),
    ("vizwiz", "accuracy"),
    ("gqa", "accuracy"),
    ("textvqa", "accuracy"),
    ("pope", "F1"),
)
_ROWS: dict[str, tuple[float | None, ...]] = {
    "sharegpt4v-7b": (
        *(72.6, 1567.4, 376.4, 68.8, 62.2, 69.7, 37.6),
        *(63.4, 68.4, 80.6, 57.2, 63.3, 60.4, None),
    ),
    "sharegpt4v-13b": (
        *(79.9, 1618.7, 303.2, 68.5, 63.7, 70.8, 43.1),
        *(65.2, 71.2, 81.0, 55.6, 64.8, 62.2, None),
    ),
    "llava-1.5-7b": (
        *(63.4, 1510.7, 316.1, 64.3, 58.3, 66.2, 30.5),
        *(58.7, 66.8, 78.5, 50.0, 62.0, 58.2, 85.9),
    ),
    "llava-1.5-13b": (
        *(70.7, 1531.3, 295.4, 67.7, 63.6, 68.2, 35.4),
        *(62.1, 71.6, 80.0, 53.6, 63.3, 61.3, 85.9),
    ),
}
PUBLISHED: dict[str, Scores] = {
    model: {column: value for column, value in zip(_COLUMNS, row, strict=True) if value is not None}
    for model, row in _ROWS.items()
}
