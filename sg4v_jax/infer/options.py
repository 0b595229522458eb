"""How to generate. Free of JAX, so that those who only ask start quickly."""

import dataclasses


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
