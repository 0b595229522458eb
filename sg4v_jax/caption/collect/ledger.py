"""What was asked, answered and spent: the results file, and what follows from it."""

import collections
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from sg4v_jax.caption.collect.endpoint import EndpointError
from sg4v_jax.caption.collect.journal import Journal
from sg4v_jax.caption.collect.prompts import prompt_sha256
from sg4v_jax.caption.collect.request import (
    Completion,
    Item,
    RequestOptions,
    prompt_tokens,
    text_tokens,
)

RESULTS = "results.jsonl"
# ShareGPT4V's captions are 942 characters on average (spec 1.8).
_USUAL_ANSWER_TOKENS = 250.0


@dataclasses.dataclass(frozen=True)
class Prices:
    """US dollars per million tokens; None where nobody said."""

    input: float | None = None
    output: float | None = None

    @property
    def known(self) -> bool:
        return self.input is not None and self.output is not None

    def cost(self, prompt: float, completion: float) -> float:
        """Dollars; 0 without prices."""
        return (prompt * (self.input or 0.0) + completion * (self.output or 0.0)) / 1e6


@dataclasses.dataclass
class ItemState:
    """What the results say about an item.

    Attributes:
      asks: requests so far, to the endpoint or in a batch file.
      answers: answers so far, whatever they were worth: the number of the next attempt.
      caption_at: where in the results its caption is; -1 while there is none.
      reason: the last answer's verdict, or the last error's kind.
      message: of the last error.
      failed: the last error was permanent.
      open_cost: the most that the request under way may cost; None when there is none.
      waiting: `custom_id` in a batch file that has not come back; "" when there is none.
      read: `custom_id`s whose answers are in.
    """

    asks: int = 0
    answers: int = 0
    caption_at: int = -1
    reason: str = ""
    message: str = ""
    failed: bool = False
    open_cost: float | None = None
    waiting: str = ""
    read: tuple[str, ...] = ()

    def finished(self, attempts: int) -> bool:
        """There is a caption, or will never be one."""
        return self.caption_at >= 0 or self.failed or self.answers >= attempts


class Ledger:
    """The results file; every method that adds to it returns when it is on disk.

    Attributes:
      spent: dollars, by the usage that endpoints reported, earlier runs included.
      prompt_tokens: of all answers.
      completion_tokens: of all answers.
      open_cost: the most that requests under way, and in batch files, may still cost.
      unconfirmed: requests without an answer that may have been billed: cut off by a kill, timed out, or
        broken off on the way back.
      unconfirmed_cost: the most that they may have cost.
      verdicts: answers by verdict.
      errors: errors by HTTP status, or what came instead of one.
      last_error: what the last of them said.
      batch_files: the batch files that were written.
    """

    def __init__(self, output: pathlib.Path, prices: Prices, budget: float | None = None):
        if budget is not None and not prices.known:
            raise ValueError("a budget needs prices: give --price-in and --price-out")
        self.journal = Journal(output / RESULTS)
        self.prices, self.budget = prices, budget
        self.spent = self.open_cost = self.unconfirmed_cost = 0.0
        self.prompt_tokens = self.completion_tokens = self.unconfirmed = 0
        self.verdicts: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.last_error = ""
        self.batch_files: set[str] = set()
        self._estimated_prompt_tokens = 0
        self._states: dict[str, ItemState] = {}
        for offset, entry in self.journal.entries():
            self._apply(entry, offset)
        # Nobody else writes here, so what is still open was cut off.
        self.cut_off = sum(self._cut(state) for state in self._states.values())

    def state(self, item_id: str) -> ItemState:
        """What is known about an item; to read, not to change."""
        return self._states.get(item_id) or ItemState()

    def estimate(self, item: Item, options: RequestOptions) -> tuple[float, float]:
        """(prompt, completion) tokens to expect of a request, corrected by the answers so far."""
        answers = self.verdicts.total()
        factor = self.prompt_tokens / self._estimated_prompt_tokens if self._estimated_prompt_tokens else 1.0
        expected = self.completion_tokens / answers if answers else _USUAL_ANSWER_TOKENS
        return prompt_tokens(item, options) * factor, min(expected, options.max_tokens)

    def max_cost(self, item: Item, options: RequestOptions) -> float:
        """The most that a request may cost in dollars: an answer of `max_tokens`."""
        return self.prices.cost(self.estimate(item, options)[0], options.max_tokens)

    def affords(self, cost: float) -> bool:
        """Whether the budget has room for one more request, beside all that may still be billed."""
        committed = self.spent + self.unconfirmed_cost + self.open_cost
        return self.budget is None or committed + cost <= self.budget

    def ask(self, item: Item, max_cost: float) -> None:
        """A request is about to be sent."""
        self._add({"event": "ask", **_key(item), "max_cost": max_cost})

    def answer(
        self,
        item: Item,
        completion: Completion,
        verdict: str,
        options: RequestOptions,
        custom_id: str = "",
    ) -> None:
        """An answer came, whatever it is worth."""
        estimated = prompt_tokens(item, options)
        # Some servers don't count: then the estimate has to do.
        counted = completion.prompt_tokens is not None and completion.completion_tokens is not None
        prompt = completion.prompt_tokens if counted else estimated
        tokens = completion.completion_tokens if counted else text_tokens(completion.text)
        assert prompt is not None and tokens is not None
        attempt = self.state(item.id).answers
        entry = {
            "event": "answer",
            "image": item.path,
            **_key(item),
            "attempt": attempt,
            "verdict": verdict,
            "caption": completion.text,
            "finish_reason": completion.finish_reason,
            "source": item.source,
            "prompt": item.prompt,
            "answered_by": completion.model,
            "request": {
                "detail": options.detail,
                "max_tokens": options.max_tokens,
                "max_image_side": options.max_image_side,
                **options.of_attempt(attempt),
                **options.extra,
            },
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": tokens,
                "counted": counted,
                "estimated_prompt_tokens": estimated,
            },
            "cost": self.prices.cost(prompt, tokens) if self.prices.known else None,
        }
        if custom_id:
            entry["custom_id"] = custom_id
        self._add(entry)

    def error(self, item: Item, error: EndpointError) -> None:
        """No answer came."""
        self._add(
            {
                "event": "error",
                "image": item.path,
                **_key(item),
                "kind": error.kind,
                "status": error.status,
                "message": str(error),
                "may_be_paid": error.may_be_paid,
            }
        )

    def batch(self, file: str, max_costs: Mapping[str, float]) -> None:
        """A batch file with requests of these `custom_id`s was written."""
        self._add({"event": "batch", "file": file, "max_costs": dict(max_costs)})

    def reopen_failed(self) -> None:
        """Lets items that failed for good be asked again."""
        for state in self._states.values():
            state.failed = False

    def _add(self, entry: dict[str, Any]) -> None:
        entry["time"] = round(time.time(), 3)
        self._apply(entry, self.journal.append(entry))

    def _apply(self, entry: dict[str, Any], offset: int) -> None:
        if entry["event"] == "batch":
            self.batch_files.add(entry["file"])
            for custom_id, cost in entry["max_costs"].items():
                state = self._states.setdefault(custom_id.rpartition("-")[0], ItemState())
                state.asks += 1
                state.waiting = custom_id
                self._open(state, cost)
            return
        state = self._states.setdefault(entry["id"], ItemState())
        if entry["event"] == "ask":
            self._cut(state)
            state.asks += 1
            self._open(state, entry["max_cost"])
        elif entry["event"] == "answer":
            # An answer may be of an older batch file than the one that is waited for.
            if entry.get("custom_id", "") == state.waiting:
                self._close(state)
            self._apply_answer(state, entry, offset)
        elif entry["event"] == "error":
            cost = self._close(state)
            if entry["may_be_paid"]:
                self.unconfirmed += 1
                self.unconfirmed_cost += cost
            state.failed = entry["kind"] == "permanent"
            state.reason, state.message = "error", entry["message"]
            self.last_error = entry["message"]
            names = {0: "no answer", 200: "unreadable answer"}
            self.errors[names.get(entry["status"], f"HTTP {entry['status']}")] += 1

    def _apply_answer(self, state: ItemState, entry: dict[str, Any], offset: int) -> None:
        usage = entry["usage"]
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"]
        self._estimated_prompt_tokens += usage["estimated_prompt_tokens"]
        cost = entry["cost"]
        if cost is None:  # Asked without prices; there may be some now.
            cost = self.prices.cost(usage["prompt_tokens"], usage["completion_tokens"])
        self.spent += cost
        self.verdicts[entry["verdict"]] += 1
        state.answers += 1
        state.reason, state.message, state.failed = entry["verdict"], "", False
        if entry["verdict"] == "accepted" and state.caption_at < 0:
            state.caption_at = offset
        if "custom_id" in entry:
            state.read += (entry["custom_id"],)

    def _open(self, state: ItemState, cost: float) -> None:
        state.open_cost = cost
        self.open_cost += cost

    def _close(self, state: ItemState) -> float:
        cost, state.open_cost, state.waiting = state.open_cost or 0.0, None, ""
        self.open_cost -= cost
        return cost

    def _cut(self, state: ItemState) -> bool:
        """A request that was under way when its process ended: it may have been billed."""
        if state.open_cost is None or state.waiting:
            return False
        self.unconfirmed += 1
        self.unconfirmed_cost += self._close(state)
        return True


def _key(item: Item) -> dict[str, str]:
    return {
        "id": item.id,
        "image_sha256": item.image_sha256,
        "prompt_sha256": prompt_sha256(item.prompt),
        "model": item.model,
    }
