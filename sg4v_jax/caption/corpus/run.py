"""The loop of bulk captioning: claims shards, keeps the engine full across their borders, puts down results.

Any number of processes run this on the same output directory, at the same time or one after the other;
`claims.py` says how they share it. What an image's caption is depends on the job and the image alone, so
the result is the same, line for line, however the work was cut up, killed and resumed.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from sg4v_jax.caption.corpus import outputs
from sg4v_jax.caption.corpus.claims import Claim, Line, Shards
from sg4v_jax.caption.corpus.guards import badness, flags_of
from sg4v_jax.caption.corpus.inputs import Corpus, CorpusImage
from sg4v_jax.caption.corpus.job import Settings, begin, describe
from sg4v_jax.data.defects import allowed_bad, inspect_image
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn
from sg4v_jax.infer.request import Completion, Prompt, Request, Result

log = logging.getLogger(__name__)

# Seconds between looks at what other processes finish, when all that is left is theirs.
_POLL = 1.0


class Completer(Protocol):
    """What is needed of `infer.engine.Engine`."""

    def complete(self, requests: Iterator[Request]) -> Iterator[Result]:
        """Answers requests in any order; a bad one gets a result that says why."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a job stands.

    Attributes:
      images: of the corpus.
      done: captioned or failed, by all processes; other processes' count when their shard is finished.
      failed: among them, as far as this process knows.
      flagged: captions that this process wrote and flagged, by flag.
      rate: images per second since this process began, by all.
    """

    images: int
    done: int
    failed: int
    flagged: Mapping[str, int]
    rate: float

    @property
    def seconds_left(self) -> float:
        return (self.images - self.done) / self.rate if self.rate else float("inf")

    def __str__(self) -> str:
        parts = [f"{self.done:,} of {self.images:,} images", f"{self.rate:.1f} images/s"]
        if 0 < self.seconds_left < float("inf"):
            minutes = round(self.seconds_left / 60)
            parts.append(f"{minutes // 60} h {minutes % 60:02d} min left")
        if self.failed:
            parts.append(f"{self.failed} failed")
        parts += [f"{count} {flag}" for flag, count in self.flagged.items()]
        return ", ".join(parts)


def caption_corpus(
    engine: Completer,
    corpus: Corpus,
    output: str | os.PathLike[str],
    settings: Settings,
    *,
    prompt: str,
    model: Mapping[str, Any],
    show: Callable[[Progress], None] = lambda progress: None,
) -> outputs.Summary:
    """Captions a corpus, together with all other processes that do so in `output`; returns when all is done.

    Args:
      engine: the captioner.
      corpus: the images.
      output: directory of the results; what is there already is not done again.
      settings: how.
      prompt: what to ask, see `job.prompt_for`.
      model: tells the captioner from others, see `job.describe_model`.
      show: called after each image, with where the job stands.

    Raises:
      ValueError: `output` holds another job.
      ImageError: more images failed than `settings.max_failed` allows.
      OSError: results can't be written.
    """
    directory = begin(output, describe(corpus, settings, prompt, model))
    count = -(-len(corpus) // settings.shard_size)
    shards = Shards(directory, count, settings.lease_seconds)
    run = _Run(engine, corpus, shards, settings, prompt, show)
    with shards.beating():
        run.work()
    shards.clean()
    if settings.parquet:
        outputs.write_parquet(shards, len(corpus), settings.shard_size)
    return outputs.write_outputs(
        shards, len(corpus), settings.shard_size, prompt, drop_flagged=settings.drop_flagged
    )


@dataclasses.dataclass
class _Shard:
    """A shard under way.

    Attributes:
      claim: on it.
      indices: of its images.
      known: captions of earlier runs, by index and SHA-256 of the image that they are of.
      lines: what is there of the shard, by index.
    """

    claim: Claim
    indices: range
    known: dict[tuple[int, str], Line]
    lines: dict[int, Line] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Attempt:
    """A request at the engine, or about to be."""

    shard: _Shard
    index: int
    image: CorpusImage
    prompt: Prompt
    number: int = 0
    flag: str = ""
    best: tuple[tuple[str, ...], Completion] | None = None


class _Run:
    def __init__(
        self,
        engine: Completer,
        corpus: Corpus,
        shards: Shards,
        settings: Settings,
        prompt: str,
        show: Callable[[Progress], None],
    ):
        self._engine, self._corpus, self._shards, self._settings = engine, corpus, shards, settings
        self._turns = (Turn("human", f"{IMAGE_PLACEHOLDER}\n{prompt}"),)
        self._show = show
        # The engine may pull requests in another thread than the one that takes results.
        self._lock = threading.RLock()
        self._under_way: dict[object, _Attempt] = {}
        self._serial = itertools.count()
        self._again: collections.deque[_Attempt] = collections.deque()
        self._allowed = allowed_bad(settings.max_failed, len(corpus))
        self._counted: set[int] = set()  # Finished shards whose failures are known.
        self._failed: dict[int, Counter[str]] = {}  # By shard.
        self._first_error = ""
        self._flagged: Counter[str] = Counter()
        self._partial = 0  # Images of shards that this process has under way.
        self._reopen: set[int] = set()
        self._began = time.monotonic()

    def work(self) -> None:
        """Until every shard is finished, by whomever."""
        if self._settings.retry_changed:
            self._reopen = self._shards.finished()
        elif self._settings.retry_failed:
            self._reopen = {shard for shard in self._shards.finished() if self._failures(shard)}
        self._count_finished()
        self._done_before = self._done()
        with concurrent.futures.ThreadPoolExecutor(thread_name_prefix="read image") as pool:
            try:
                while self._left():
                    for result in self._engine.complete(self._requests(pool)):
                        self._take(result)
                    if self._again:
                        continue
                    if self._under_way or self._shards.held():
                        raise RuntimeError(
                            f"the engine left {len(self._under_way)} requests without an answer, and shards "
                            f"{self._shards.held()} unfinished"
                        )
                    self._count_finished()
                    if self._left():
                        time.sleep(_POLL)  # The rest is other processes'; one of them may die.
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    # --- Requests ----------------------------------------------------------------------------------

    def _requests(self, pool: concurrent.futures.Executor) -> Iterator[Request]:
        """Second attempts first, then images, until no shard is free."""
        images = self._images(pool)
        while True:
            if self._again:
                attempt = self._again.popleft()
                if not self._abandoned(attempt.shard):
                    yield self._request(attempt)
                continue
            following = next(images, None)
            if following is None:
                return
            shard, index, image = following
            if image.error:
                self._put(shard, index, outputs.failure_line(image.name, image.kind, image.error))
            elif known := shard.known.get((index, image.sha256)):
                self._put(shard, index, known, new=False)
            else:
                prompt = Prompt(self._turns, (image.data,))
                yield self._request(_Attempt(shard, index, image, prompt))

    def _request(self, attempt: _Attempt) -> Request:
        with self._lock:
            key = next(self._serial)  # An image comes again when its shard was lost and got back.
            self._under_way[key] = attempt
        guards, first = self._settings.guards, self._settings.options
        return Request(
            key, attempt.prompt, guards.options(first, attempt.flag, attempt.number, attempt.index)
        )

    def _images(self, pool: concurrent.futures.Executor) -> Iterator[tuple[_Shard, int, CorpusImage]]:
        """Images of one shard after the other; each is claimed when its first image is read ahead."""
        ahead: collections.deque[tuple[_Shard, int, concurrent.futures.Future[CorpusImage]]]
        ahead = collections.deque()
        todo = self._todo()
        while True:
            while len(ahead) < self._settings.read_ahead and (following := next(todo, None)):
                shard, index = following
                future = pool.submit(self._corpus.read, index, self._settings.max_image_bytes)
                ahead.append((shard, index, future))
            if not ahead:
                return
            shard, index, future = ahead.popleft()
            image = future.result()
            if not self._abandoned(shard):
                yield shard, index, image

    def _todo(self) -> Iterator[tuple[_Shard, int]]:
        while True:
            self._count_finished()
            wanted = filter(self._is_open, range(self._shards.count))
            claim = self._shards.claim(wanted, again=self._reopen)
            if claim is None:
                return
            shard = self._resume(claim)
            for index in shard.indices:
                yield shard, index

    def _resume(self, claim: Claim) -> _Shard:
        """A shard with what is known of it already; its images are read again, for they may be others."""
        size = self._settings.shard_size
        indices = range(claim.shard * size, min((claim.shard + 1) * size, len(self._corpus)))
        found = [*claim.found]
        if claim.shard in self._reopen:
            finished = outputs.read_shard(self._shards.path(claim.shard))
            found += [line | {"index": index} for index, line in zip(indices, finished, strict=True)]
        known: dict[tuple[int, str], Line] = {}
        for line in found:
            # Failures are tried again: they may have been the disk's. The first caption stays.
            if "error" not in line:
                known.setdefault((line.pop("index"), line["image_sha256"]), line)
        return _Shard(claim, indices, known)

    # --- Results -----------------------------------------------------------------------------------

    def _take(self, result: Result) -> None:
        with self._lock:
            attempt = self._under_way.pop(result.key)
        completion = result.completion
        if completion is None and attempt.best is None:
            self._put(attempt.shard, attempt.index, _not_answered(attempt.image, result.error))
            return
        candidates = [attempt.best] if attempt.best else []
        if completion is not None:
            candidates.append((flags_of(completion), completion))
        # Of two equally bad ones, the first.
        best = min(candidates, key=lambda candidate: badness(candidate[0]))
        if best[0] and completion is not None and attempt.number < self._settings.guards.retry:
            flag = candidates[-1][0][0]
            following = dataclasses.replace(attempt, number=attempt.number + 1, flag=flag, best=best)
            self._again.append(following)
            return
        name, sha256 = attempt.image.name, attempt.image.sha256
        line = outputs.caption_line(name, sha256, best[1], best[0], attempts=attempt.number + 1)
        with self._lock:
            self._flagged.update(best[0])
        self._put(attempt.shard, attempt.index, line)

    def _put(self, shard: _Shard, index: int, line: Line, new: bool = True) -> None:
        with self._lock:
            if self._abandoned(shard):
                return
            if new:
                shard.claim.append({"index": index} | line)
            else:
                self._done_before += 1
            shard.lines[index] = line
            self._partial += 1
            if "error" in line:
                self._fail(shard.claim.shard, line)
            if len(shard.lines) == len(shard.indices):
                self._finish(shard)
            self._show(self._progress())

    def _finish(self, shard: _Shard) -> None:
        replace = shard.claim.shard in self._reopen
        first = self._shards.finish(shard.claim, (shard.lines[index] for index in shard.indices), replace)
        with self._lock:
            self._reopen.discard(shard.claim.shard)
            self._partial -= len(shard.lines)
            if first:
                self._counted.add(shard.claim.shard)
            else:  # Its failures are those of the file that is there.
                self._failed.pop(shard.claim.shard, None)

    def _abandoned(self, shard: _Shard) -> bool:
        """Whether a shard is another process's, which took this one for dead; leaves it to that one."""
        with self._lock:
            if shard.claim.lost and shard.claim.shard in self._shards.held():
                log.warning("shard %d was taken over by another process", shard.claim.shard)
                self._shards.abandon(shard.claim)
                self._partial -= len(shard.lines)
                self._failed.pop(shard.claim.shard, None)
            return shard.claim.lost

    # --- Where it stands ---------------------------------------------------------------------------

    def _is_open(self, shard: int) -> bool:
        return shard not in self._shards_finished or shard in self._reopen

    def _left(self) -> bool:
        return bool(self._again) or any(map(self._is_open, range(self._shards.count)))

    def _count_finished(self) -> None:
        """Looks at what is finished, and counts the failures of shards that are new there."""
        with self._lock:
            self._shards_finished = self._shards.finished()
            for shard in sorted(self._shards_finished - self._counted - self._reopen):
                self._counted.add(shard)
                for line in self._failures(shard):
                    self._fail(shard, line)

    def _failures(self, shard: int) -> list[Line]:
        return [line for line in outputs.read_shard(self._shards.path(shard)) if "error" in line]

    def _fail(self, shard: int, line: Line) -> None:
        self._failed.setdefault(shard, Counter())[line["kind"]] += 1
        self._first_error = self._first_error or line["error"]
        failed = sum(self._failed.values(), Counter())
        if failed.total() > self._allowed:
            counts = ", ".join(f"{count} {kind}" for kind, count in failed.most_common())
            raise ImageError(
                f"{failed.total()} of {len(self._corpus)} images failed, more than --max-failed "
                f"{self._settings.max_failed} allows ({counts}); the first: {self._first_error}. "
                "The same command goes on: with --retry-failed once that is mended, or with more --max-failed"
            )

    def _done(self) -> int:
        size, last = self._settings.shard_size, self._shards.count - 1
        full = len(self._counted) * size
        if last in self._counted:
            full -= (last + 1) * size - len(self._corpus)
        return full + self._partial

    def _progress(self) -> Progress:
        done = self._done()
        elapsed = time.monotonic() - self._began
        return Progress(
            images=len(self._corpus),
            done=done,
            failed=sum(counts.total() for counts in self._failed.values()),
            flagged=dict(self._flagged),
            rate=(done - self._done_before) / elapsed if elapsed else 0.0,
        )


def _not_answered(image: CorpusImage, error: str) -> Line:
    """Says what is wrong with the image, if that is why there is no answer."""
    try:
        inspect_image(image.data, image.name)
    except ImageError as found:
        return outputs.failure_line(image.name, getattr(found, "kind", ""), str(found))
    return outputs.failure_line(image.name, "not_answered", f"{image.name}: {error}")
