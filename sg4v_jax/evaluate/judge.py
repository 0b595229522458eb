"""Asking a language model for verdicts: any OpenAI-compatible endpoint, every answer kept, none invented."""

import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from sg4v_jax.caption.collect.endpoint import Endpoint, EndpointError
from sg4v_jax.caption.collect.journal import Journal

_RETRIES = 6
_LONGEST_WAIT = 120.0


@dataclasses.dataclass(frozen=True)
class Question:
    """What to ask a judge.

    Attributes:
      messages: as /chat/completions takes them.
      max_tokens: of the verdict.
      temperature: as the benchmark's tool asks.
      repeat: which asking of the same words this is; the memory keeps them apart.
    """

    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    temperature: float
    repeat: int = 0

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body."""
        return {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge said.

    Attributes:
      text: its words; "" if there are none.
      model: who answered, by the endpoint's word.
      error: why there is no answer; "" if there is one.
    """

    text: str
    model: str
    error: str = ""


class Judge:
    """A judge with a memory: what was asked once is never paid for again."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        cache: str | os.PathLike[str],
        *,
        runs: int = 0,
        workers: int = 8,
    ):
        """Args:
        endpoint: where to ask.
        model: whom to ask.
        cache: a file of JSON lines, made if need be.
        runs: how often each answer is judged where the official tool does so repeatedly; 0 is as there.
        workers: questions under way at a time.
        """
        if runs < 0:
            raise ValueError(f"runs={runs} is negative")
        self.model, self.runs = model, runs
        self._endpoint, self._workers = endpoint, workers
        pathlib.Path(cache).parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(cache)
        self._known = {
            entry["key"]: Verdict(entry["text"], entry["model"]) for _, entry in self._journal.entries()
        }

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts, in the order of the questions.

        Raises:
          ValueError: the endpoint says that a person has to act first (key, credit).
        """
        return asyncio.run(self._ask_all(questions))

    def close(self) -> None:
        """Closes the memory and lets the threads go."""
        self._journal.close()
        self._endpoint.close()

    async def _ask_all(self, questions: Sequence[Question]) -> list[Verdict]:
        free = asyncio.Semaphore(self._workers)

        async def one(question: Question) -> Verdict:
            async with free:
                return await self._ask(question)

        return list(await asyncio.gather(*map(one, questions)))

    async def _ask(self, question: Question) -> Verdict:
        body = json.dumps(question.body(self.model), ensure_ascii=False, sort_keys=True).encode(
            "utf-8", "replace"
        )
        repeat = f"#{question.repeat}".encode() if question.repeat else b""
        key = hashlib.sha256(body + repeat).hexdigest()
        if key in self._known:
            return self._known[key]
        for attempt in range(_RETRIES):
            try:
                completion = await self._endpoint.complete(body)
            except EndpointError as error:
                if error.kind == "stop":
                    raise ValueError(f"the judge can't be asked: {error}") from error
                if error.kind == "permanent" or attempt == _RETRIES - 1:
                    return Verdict("", "", str(error))
                wait = error.retry_after if error.retry_after is not None else random.uniform(0, 2.0**attempt)
                await asyncio.sleep(min(wait, _LONGEST_WAIT))
            else:
                verdict = Verdict(completion.text, completion.model or self.model)
                self._known[key] = verdict
                self._journal.append({"key": key, "model": verdict.model, "text": verdict.text})
                return verdict
        raise AssertionError("unreachable")
