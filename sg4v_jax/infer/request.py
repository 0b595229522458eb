"""What the engine is asked, and what it answers."""

import dataclasses
from collections.abc import Hashable

from sg4v_jax.data.records import Turn
from sg4v_jax.infer.options import SamplingOptions

# Why an answer ended (`Completion.stop`).
END, STOP_STRING, LENGTH = "end", "stop_string", "length"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to answer.

    Attributes:
      turns: the conversation, ending with a human turn; `<image>` marks where images go.
      images: encoded image files, one for each `<image>`.
      template: how to write the turns; "" is as the model was trained. Both must end answers alike.
      aspect: how to bring images to a square; "" is as the model was trained.
    """

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    template: str = ""
    aspect: str = ""


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
