"""Putting a benchmark's questions to the engine; an answer is on disk when the next one comes."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from sg4v_jax.caption.collect.journal import Journal
from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn
from sg4v_jax.evaluate.benchmark import LETTERS, Loaded, Sample
from sg4v_jax.evaluate.settings import Settings
from sg4v_jax.infer.request import Prompt, Request, Result, ScoreRequest, ScoreResult
from sg4v_jax.infer.sampling import SamplingOptions

logger = logging.getLogger(__name__)

SYNC_EVERY = 32
"""A power cut loses fewer answers than this for each process; a kill loses none."""

Entry = dict[str, Any]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Counted(Iterable[Any]):
    """Items whose number is known before they come, so that progress can say what is left."""

    items: Iterable[Any]
    count: int

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return self.count


class Answers(Protocol):
    """The part of `infer.engine.Engine` that a benchmark needs."""

    def complete(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Answers, in order of completion."""

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Likelihoods, in order of completion."""


def answer_samples(
    engine: Answers,
    loaded: Loaded,
    samples: Sequence[Sample],
    settings: Settings,
    folder: pathlib.Path,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: Progress = iter,
) -> int:
    """Answers this shard's part of the samples, those left out that any shard has answered before.

    Samples that got an error instead of an answer are asked again.

    Args:
      engine: who answers.
      loaded: where images are.
      samples: all samples of the run.
      settings: how to ask.
      folder: where the journals are.
      shard: (index, count); every sample belongs to one shard.
      progress: wraps the iteration over answers; what it gets has a length.

    Returns:
      How many were asked.

    Raises:
      ValueError: another process is at work on the same shard.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index}/{count}: expected one of 0/{count} to {count - 1}/{count}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"answers-{index:03d}-of-{count:03d}.jsonl"
    with _locked(path):
        _cut_torn_line(path)
        # Answers cost little: thousands of them need not each wait for the disk.
        journal = Journal(path, sync_every=SYNC_EVERY)
        try:
            answered = {id_ for id_, entry in read_answers(folder).items() if not entry["error"]}
            todo = [s for s in samples[index::count] if s.id not in answered]
            if todo:
                for entry in progress(Counted(_ask(engine, loaded, todo, settings), len(todo))):
                    journal.append(entry)
        finally:
            journal.close()
    return len(todo)


def read_answers(folder: pathlib.Path) -> dict[str, Entry]:
    """The journals' entries by sample id; an answer goes before an error, the later before the earlier.

    Other processes may be writing them: a line without an end is left alone. One that can't be read, as a
    power cut may leave it, is left out with a warning, so that its question is asked again.
    """
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob("answers-*-of-*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    better = not entry["error"] or entry["id"] not in found
                except (ValueError, TypeError, KeyError):
                    logger.warning("%s: line %d is damaged; it counts as no answer", path, number)
                    continue
                if better:
                    found[entry["id"]] = entry
    return found


def prompt_of(sample: Sample, settings: Settings, images: tuple[bytes, ...]) -> Prompt:
    """A sample as the model gets it: the image before the text."""
    text = sample.stem if settings.mode == "contents" else sample.question
    if sample.image is not None:
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    return Prompt((Turn("human", text),), images, settings.template, settings.aspect)


def read_image(root: pathlib.Path, image: str | bytes | None) -> tuple[bytes, ...]:
    """The bytes of a sample's image, if it has one.

    Raises:
      ValueError: the path leads out of the benchmark's folder.
      OSError: it can't be read.
    """
    if image is None:
        return ()
    if isinstance(image, bytes):
        return (image,)
    relative = pathlib.PurePosixPath(image)
    # Links are the user's own: test sets are shared between benchmarks.
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"image path {image!r} leads out of {root}")
    return ((root / relative).read_bytes(),)


def _cut_torn_line(path: pathlib.Path) -> None:
    """Cuts off what a kill or a power cut left half written: the next line would become part of it."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logger.warning("%s: the last line is torn; its question is asked again", path)
            os.truncate(path, whole)


def _ask(engine: Answers, loaded: Loaded, todo: Sequence[Sample], settings: Settings) -> Iterator[Entry]:
    unreadable: list[Entry] = []

    def prompts() -> Iterator[tuple[Sample, Prompt]]:
        for sample in todo:
            try:
                yield sample, prompt_of(sample, settings, read_image(loaded.root, sample.image))
            except (OSError, ValueError) as error:
                unreadable.append(_entry(sample.id, "", error=f"{sample.image!s}: {_reason(error)}"))

    if settings.mode == "generate":
        yield from _generate(engine, prompts(), settings)
    else:
        by_id = {sample.id: sample for sample in todo}
        yield from _rank(engine, prompts(), settings, by_id)
    yield from unreadable


def _generate(
    engine: Answers, prompts: Iterable[tuple[Sample, Prompt]], settings: Settings
) -> Iterator[Entry]:
    options = SamplingOptions(max_new_tokens=settings.max_new_tokens)
    for result in engine.complete(Request(sample.id, prompt, options) for sample, prompt in prompts):
        if result.completion is None:
            yield _entry(result.key, "", error=result.error or "no answer")
        else:
            done = result.completion
            yield _entry(result.key, done.text, tokens=len(done.tokens), stop=done.stop)


def _rank(
    engine: Answers,
    prompts: Iterable[tuple[Sample, Prompt]],
    settings: Settings,
    samples: Mapping[str, Sample],
) -> Iterator[Entry]:
    """The letter of the likeliest option."""
    contents = settings.mode == "contents"
    requests = (
        ScoreRequest(s.id, prompt, s.choices if contents else tuple(LETTERS[: len(s.choices)]))
        for s, prompt in prompts
    )
    for result in engine.score(requests):
        if result.error:
            yield _entry(result.key, "", error=result.error)
            continue
        values = [
            # Otherwise the shorter text would win.
            log / max(count, 1) if contents else log
            for log, count in zip(result.log_probabilities, result.num_tokens, strict=True)
        ]
        best = max(range(len(values)), key=values.__getitem__)
        yield _entry(result.key, LETTERS[best], log_probabilities=[round(value, 6) for value in values])


def _entry(id_: Any, text: str, *, error: str = "", **more: Any) -> Entry:
    return {"id": id_, "text": text, "error": error, **more}


def _reason(error: Exception) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else str(error)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a journal for one process: two would ask the same questions."""
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{path}: another process is answering there; give each its own --shard"
            ) from error
        yield
        os.unlink(file.name)
