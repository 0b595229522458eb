"""A collection of captions: the images, what to ask about each, and what came back so far."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sg4v_jax import atomic
from sg4v_jax.caption.collect.filters import Filters
from sg4v_jax.caption.collect.journal import locked
from sg4v_jax.caption.collect.ledger import Ledger, Prices
from sg4v_jax.caption.collect.prompts import Prompts, question_for
from sg4v_jax.caption.collect.request import Completion, Item, RequestOptions
from sg4v_jax.caption.collect.scan import ScannedImage, scan
from sg4v_jax.data.records import IMAGE_PLACEHOLDER

CAPTIONS, REJECTED = "captions.json", "rejected.jsonl"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a collection is made with.

    Attributes:
      model: whom to ask.
      prompts: what to ask, by source.
      request: how to ask.
      filters: what a caption must be.
      attempts: answers to ask for until one is a caption.
      prices: of the model.
      budget: dollars that this collection may cost in all, over all runs; None is no limit.
      question: the human turn of the LLaVA-format output; "" takes one of ours for each image.
      max_image_bytes: larger files are bad images.
      max_bad_images: more bad images than this stop the run before anything is asked.
    """

    model: str
    prompts: Prompts = dataclasses.field(default_factory=Prompts)
    request: RequestOptions = dataclasses.field(default_factory=RequestOptions)
    filters: Filters = dataclasses.field(default_factory=Filters)
    attempts: int = 3
    prices: Prices = dataclasses.field(default_factory=Prices)
    budget: float | None = None
    question: str = ""
    max_image_bytes: int = 20_000_000
    max_bad_images: int = 100

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("no model: give --model")
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: at least one is needed")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Where a collection stands; the counts are of images and add up to all of them.

    Attributes:
      captioned: with a caption.
      rejected: every attempt's answer was refused by the filters.
      failed: the endpoint will not answer.
      bad: can't be read.
      waiting: in a batch file that has not come back.
      pending: still to be asked.
    """

    captioned: int = 0
    rejected: int = 0
    failed: int = 0
    bad: int = 0
    waiting: int = 0
    pending: int = 0


class Collection:
    """See the module. Made by `open_collection`."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        output: pathlib.Path,
        images: list[ScannedImage],
        settings: Settings,
    ):
        self.root, self.output, self.images, self.settings = root, output, images, settings
        # Images of the same bytes are one item, unless their sources ask different things.
        self.items: dict[str, Item] = {}
        self._item_of: dict[str, str] = {}
        for image in images:
            if not image.error:
                item = self._item(image)
                self._item_of[image.path] = self.items.setdefault(item.id, item).id
        self.ledger = Ledger(output, settings.prices, settings.budget)

    def todo(self) -> list[Item]:
        """Items to ask: neither finished nor waiting for a batch file to come back."""
        return [item for item in self.items.values() if self.is_open(item) and not self.is_waiting(item)]

    def is_open(self, item: Item) -> bool:
        """It has no caption, and may get one."""
        return not self.ledger.state(item.id).finished(self.settings.attempts)

    def is_waiting(self, item: Item) -> bool:
        """It is in a batch file that has not come back."""
        return bool(self.ledger.state(item.id).waiting)

    def record(self, item: Item, completion: Completion, custom_id: str = "") -> None:
        """Judges an answer and puts it on disk."""
        filters = self.settings.filters
        verdict = filters.verdict(completion.text, completion.finish_reason, completion.refused)
        self.ledger.answer(item, completion, verdict, self.settings.request, custom_id)

    def estimate(self) -> str:
        """What is to be asked, by source, and what it will about cost."""
        todo, ledger, request = self.todo(), self.ledger, self.settings.request
        tokens = [ledger.estimate(item, request) for item in todo]
        prompt, completion = (
            (round(sum(of_item)) for of_item in zip(*tokens, strict=True)) if tokens else (0, 0)
        )
        sources = Counter(item.source for item in todo)
        shown = ", ".join(f"{source} {count}" for source, count in sources.most_common()) or "nothing"
        basis = f"{ledger.verdicts.total()} answers so far" if ledger.verdicts else "GPT-4's published rules"
        lines = [
            f"to ask: {len(todo)} requests for {len(self.images)} images ({shown})",
            f"estimate: {prompt:,} prompt and {completion:,} answer tokens, by {basis}; repeats come on top",
        ]
        if self.settings.prices.known:
            worst = sum(ledger.max_cost(item, request) for item in todo)
            cost = self.settings.prices.cost(prompt, completion)
            budget = "" if self.settings.budget is None else f", budget ${self.settings.budget:.2f}"
            lines.append(f"cost: about ${cost:.2f}, at most ${worst:.2f}; spent ${ledger.spent:.2f}{budget}")
        return "\n".join(lines)

    def write_outputs(self) -> Summary:
        """Writes `captions.json` for training, and `rejected.jsonl`: who has no caption, and why."""
        counts: Counter[str] = Counter()
        captions_file, rejected_file = self.output / CAPTIONS, self.output / REJECTED
        with atomic.replacing(captions_file) as captions, atomic.replacing(rejected_file) as rejected:
            captions.write(b"[")
            for image in self.images:
                standing, line = self._outcome(image)
                counts[standing] += 1
                if standing == "captioned":
                    captions.write(b",\n" if counts[standing] > 1 else b"\n")
                    captions.write(json.dumps(line, ensure_ascii=False).encode())
                elif line:
                    rejected.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            captions.write(b"\n]\n")
        return Summary(**counts)

    def _outcome(self, image: ScannedImage) -> tuple[str, dict[str, Any]]:
        """(field of `Summary`, record of the output file); nothing to write for what is not over."""
        if image.error:
            return "bad", {"image": image.path, "reason": "bad image", "message": image.error}
        item = self.items[self._item_of[image.path]]
        state = self.ledger.state(item.id)
        if state.caption_at >= 0:
            return "captioned", self._record(image, self.ledger.journal.at(state.caption_at)["caption"])
        if state.waiting:
            return "waiting", {}
        if not state.finished(self.settings.attempts):
            return "pending", {}
        line = {
            "image": image.path,
            "source": item.source,
            "reason": state.reason,
            "message": state.message,
            "answers": state.answers,
        }
        return ("failed" if state.failed else "rejected"), line

    def _record(self, image: ScannedImage, caption: str) -> dict[str, Any]:
        question = self.settings.question or question_for(image.sha256)
        return {
            "id": pathlib.PurePosixPath(image.path).stem,
            "image": image.path,
            "conversations": [
                {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}"},
                {"from": "gpt", "value": caption},
            ],
        }

    def _item(self, image: ScannedImage) -> Item:
        prompts = self.settings.prompts
        source = prompts.source(image.path)
        size = (image.width, image.height)
        return Item(image.path, image.sha256, *size, source, prompts.text(source), self.settings.model)


@contextlib.contextmanager
def open_collection(
    images: Sequence[str],
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings,
    *,
    progress: Callable[..., Iterable[Any]] = iter,
) -> Iterator[Collection]:
    """Scans the images, reads what is in `output` already, and keeps other processes out of it.

    Args:
      images: paths relative to `root`.
      root: where they are; paths that leave it are bad images.
      output: directory of the results; made if it isn't there.
      settings: of the collection.
      progress: wraps the scan.

    Raises:
      ValueError: too many bad images, a damaged results file, or another process in `output`.
    """
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        scanned = scan(
            list(dict.fromkeys(images)),
            root,
            output,
            max_bytes=settings.max_image_bytes,
            max_bad=settings.max_bad_images,
            progress=progress,
        )
        collection = Collection(root, output, scanned, settings)
        try:
            yield collection
        finally:
            collection.ledger.journal.close()
