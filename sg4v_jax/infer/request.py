"""What the engine is asked, and what it answers. Free of JAX: those who only ask start quickly."""

import dataclasses
from collections.abc import Hashable

from sg4v_jax.data.records import Turn

# Why an answer ended (`Completion.stop`).
END, STOP_STRING, LENGTH = "end", "stop_string", "length"


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to generate.

    Attributes:
      max_new_tokens: most tokens generated.
      temperature: 0 is greedy.
      top_p: sample from the smallest set of tokens with this probability; 1 is off.
      top_k: sample from this many best tokens; 0 is off.
      repetition_penalty: divides positive scores of tokens seen before, multiplies negative ones;
        1 is off (Keskar et al. 2019).
      seed: decides what is drawn, whatever else is in the batch.
      min_new_tokens: the answer can't end before it has this many tokens.
      no_repeat_ngram: no sequence of this many tokens comes twice, the prompt's included; 0 is off.
      stop: texts that end the answer; they are not part of it.
      num_beams: 1, or the width of a beam search (which is greedy).
      length_penalty: beams are compared by log-probability / length ** length_penalty.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens > 0,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "repetition_penalty": self.repetition_penalty > 0,
            "min_new_tokens": 0 <= self.min_new_tokens <= self.max_new_tokens,
            "no_repeat_ngram": self.no_repeat_ngram >= 0,
            "stop": all(self.stop),
            "num_beams": self.num_beams > 0,
        }
        for name, valid in checks.items():
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; see SamplingOptions")
        if self.num_beams > 1 and (self.temperature > 0 or self.stop):
            raise ValueError("num_beams > 1 goes with neither temperature > 0 nor stop strings")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to answer.

    Attributes:
      turns: the conversation, ending with a human turn; `<image>` marks where images go.
      images: encoded image files, one for each `<image>`.
    """

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
      key: tells the results apart.
      prompt: what to answer.
      options: how.
    """

    key: Hashable
    prompt: Prompt
    options: SamplingOptions


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: the answer, without stop string or special tokens, stripped.
      tokens: the generated ids, the one that ended the answer included.
      finished: False if `max_new_tokens` cut it off.
      log_probability: of `tokens` given the prompt, in nats, by the model alone: no temperature, filter
        or penalty. For beam search, the beam's score: by the penalised probabilities, divided by
        length ** length_penalty.
      stop: why it ended: `end` (the template's end of an answer), `stop_string` or `length`.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    log_probability: float | None
    stop: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
      key: the request's.
      completion: the answer, None if there is an error.
      error: what was wrong with the request; empty if nothing.
    """

    key: Hashable
    completion: Completion | None
    error: str


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """Answers whose probabilities are asked for.

    Attributes:
      key: tells the results apart.
      prompt: what to answer.
      choices: the answers, as the model would write them.
    """

    key: Hashable
    prompt: Prompt
    choices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ScoreResult:
    """The probabilities of answers.

    Attributes:
      key: the request's.
      log_probabilities: of each choice given the prompt, in nats: the sum over its tokens. The end of
        the answer is not among them.
      num_tokens: tokens of each choice.
      error: what was wrong with the request; empty if nothing.
    """

    key: Hashable
    log_probabilities: tuple[float, ...]
    num_tokens: tuple[int, ...]
    error: str
