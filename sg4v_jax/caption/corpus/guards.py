"""What can be wrong with a caption that a decoder wrote: loops, ends in mid-sentence, nothing at all."""

import dataclasses
from typing import Any

from sg4v_jax.caption.flaws import ends_whole, repeats
from sg4v_jax.infer.options import SamplingOptions
from sg4v_jax.infer.request import Completion

# In the order of how bad they are.
FLAGS = ("empty", "repetition", "truncated")
# Another number for each attempt, far from those of other images.
_SEED_STEP = 0x9E3779B9


@dataclasses.dataclass(frozen=True)
class Guards:
    """What to do about flagged captions.

    Attributes:
      retry: further attempts, each with the settings below and a seed of its own; the first without a flag
        is taken, else the least bad one.
      temperature: of these attempts, if higher than the first one's.
      repetition_penalty: of attempts after a loop, if higher than the first one's.
      max_new_tokens: of attempts after a truncated one, if more than the first one's.
    """

    retry: int = 0
    temperature: float = 0.5
    repetition_penalty: float = 1.2
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.retry < 0 or self.max_new_tokens < 0:
            raise ValueError(
                f"retry={self.retry} and its max_new_tokens={self.max_new_tokens} can't be negative"
            )
        # Says what is out of range.
        SamplingOptions(temperature=self.temperature, repetition_penalty=self.repetition_penalty)

    def deciding(self) -> dict[str, Any]:
        """What the captions depend on."""
        return dataclasses.asdict(self) if self.retry else {"retry": 0}

    def options(self, first: SamplingOptions, flag: str, attempt: int, index: int) -> SamplingOptions:
        """How to generate for an image.

        Args:
          first: the job's options.
          flag: the worst of the last attempt's; "" for the first attempt.
          attempt: from 0.
          index: of the image in the corpus.
        """
        seed = (first.seed + index + attempt * _SEED_STEP) % 2**32
        if not attempt:
            return dataclasses.replace(first, seed=seed)
        changes: dict[str, Any] = {"temperature": max(first.temperature, self.temperature)}
        if changes["temperature"] > 0:
            changes["num_beams"] = 1
        if flag == "repetition":
            changes["repetition_penalty"] = max(first.repetition_penalty, self.repetition_penalty)
        if flag == "truncated":
            changes["max_new_tokens"] = max(first.max_new_tokens, self.max_new_tokens)
        return dataclasses.replace(first, seed=seed, **changes)


def flags_of(completion: Completion) -> tuple[str, ...]:
    """What is wrong with a caption, some of `FLAGS`; empty if nothing is."""
    text = completion.text.strip()
    found = {
        "empty": not text,
        "repetition": repeats(text, completion.tokens),
        "truncated": bool(text) and not (completion.finished and ends_whole(text)),
    }
    return tuple(flag for flag in FLAGS if found[flag])


def badness(flags: tuple[str, ...]) -> tuple[int, ...]:
    """Worse is greater: no caption, then a loop, then an end that is missing."""
    return tuple(int(flag in flags) for flag in FLAGS)
