"""An answer as it grows."""

import math
from collections.abc import Collection, Sequence

from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.infer.request import END, LENGTH, STOP_STRING, Completion, Request


class Answer:
    """The tokens that a request has got so far.

    Attributes:
      request: the request.
      completion: the whole answer, once there is no more to come.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, stop_ids: Collection[int]):
        self.request = request
        self.completion: Completion | None = None
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._tokens: list[int] = []
        self._log_probabilities: list[float] = []
        # As many tokens as can be in a stop string, each being a byte or more of it; and the one before.
        self._window = max((len(stop.encode()) for stop in request.options.stop), default=0) + 1

    def take(self, tokens: Sequence[int], log_probabilities: Sequence[float]) -> None:
        """Adds tokens, up to the one that ends the answer."""
        for token, log_probability in zip(tokens, log_probabilities, strict=True):
            self._tokens.append(token)
            self._log_probabilities.append(log_probability)
            if token in self._stop_ids:
                return self._finish(END)
            if self.request.options.stop and self._stop_at(self._tokens[-self._window :])[0]:
                return self._finish(STOP_STRING)
            if len(self._tokens) >= self.request.options.max_new_tokens:
                return self._finish(LENGTH)

    def take_beam(self, tokens: Sequence[int], score: float) -> None:
        """Ends the answer with what a beam search has found."""
        self._tokens, self._log_probabilities = list(tokens), [score]
        self._finish(END if tokens[-1] in self._stop_ids else LENGTH)

    def text_so_far(self) -> str:
        """The text that no further token can change."""
        if self.completion is not None:
            return self.completion.text
        # A character can be spread over several tokens, and so can a stop string.
        text = self._tokenizer.decode(self._tokens).strip().rstrip("\ufffd")
        for stop in self.request.options.stop:
            begun = (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
            text = text[: len(text) - next(begun, 0)]
        return text.strip()

    def _stop_at(self, tokens: Sequence[int]) -> tuple[bool, str]:
        """(whether these tokens have a stop string, the text before the first)."""
        text = self._tokenizer.decode(tokens)
        found = [at for at in map(text.find, self.request.options.stop) if at >= 0]
        return bool(found), text[: min(found, default=len(text))]

    def _finish(self, stop: str) -> None:
        tokens = self._tokens[:-1] if stop == END else self._tokens
        self.completion = Completion(
            text=self._stop_at(tokens)[1].strip(),
            tokens=tuple(self._tokens),
            finished=stop != LENGTH,
            log_probability=math.fsum(self._log_probabilities),
            stop=stop,
        )
