"""How a benchmark is run: what moves scores, written down beside them."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from sg4v_jax.data.image import ASPECTS
from sg4v_jax.evaluate.benchmark import Benchmark, Sample
from sg4v_jax.evaluate.files import read_json, write_json

Mode = Literal["generate", "letters", "contents"]
MODES: tuple[Mode, ...] = ("generate", "letters", "contents")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides an answer, beside the model.

    Attributes:
      benchmark: its name.
      model: the model's name.
      mode: "generate" greedily; "letters" and "contents" take the likeliest of a question's option
        letters, or of its options' texts (per token, asked without the list of options).
      template: conversation template.
      aspect: image preprocessing.
      max_new_tokens: most tokens of an answer.
      precision: what the model computes in, and what is quantised.
      samples: how many questions.
      digest: SHA-256 of the questions and their truth.
    """

    benchmark: str
    model: str
    mode: Mode
    template: str
    aspect: str
    max_new_tokens: int
    precision: str
    samples: int
    digest: str

    def claim(self, folder: pathlib.Path) -> None:
        """Writes the settings of a new run, or makes sure that a run to go on with has the same.

        Raises:
          ValueError: it hasn't; names what differs.
        """
        path = folder / "run.json"
        own = dataclasses.asdict(self)
        if not path.exists():
            write_json(path, own, indent=1)
            return
        other = read_json(path, dict)
        if differing := [name for name in own if own[name] != other.get(name)]:
            details = ", ".join(f"{name} was {other.get(name)!r}, is {own[name]!r}" for name in differing)
            raise ValueError(f"{folder} holds another run: {details}; give another --output, or remove it")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a user may set; what is empty or 0 stays as published. `precision` is for the records."""

    mode: Mode = "generate"
    template: str = ""
    aspect: str = ""
    max_new_tokens: int = 0
    limit: int = 0
    precision: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.aspect and self.aspect not in ASPECTS:
            raise ValueError(f"aspect {self.aspect!r} is not one of {', '.join(ASPECTS)}")
        if self.max_new_tokens < 0 or self.limit < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} or limit={self.limit} is negative")

    def settings(self, benchmark: Benchmark, model: str, samples: Sequence[Sample]) -> Settings:
        """The settings of a benchmark's run over these samples.

        Raises:
          ValueError: a question has no options to choose the likeliest of.
        """
        if self.mode != "generate" and not all(sample.choices for sample in samples):
            raise ValueError(
                f"{benchmark.name} is not multiple choice: there is nothing to take the likeliest of"
            )
        return Settings(
            benchmark=benchmark.name,
            model=model,
            mode=self.mode,
            template=self.template or benchmark.template,
            aspect=self.aspect or benchmark.aspect,
            max_new_tokens=self.max_new_tokens or benchmark.max_new_tokens,
            precision=self.precision,
            samples=len(samples),
            digest=_digest(samples),
        )


def _digest(samples: Sequence[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        asked: list[Any] = [sample.id, sample.question, sample.truth]
        found.update(json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace"))
    return found.hexdigest()
