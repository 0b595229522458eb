"""The one engine: chat, bulk captioning and evaluation all generate with it.

A fixed number of slots decode together; a finished one is given the next prompt at once (continuous
batching). Prompts are read by threads ahead of need, prefilled several at a time, and wait on the device
for a slot. What a decoding program returns is fetched while the next one runs, so that the device never
waits for the host.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.data.conversation import get_template, stop_string
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.infer.answer import Answer
from sg4v_jax.infer.device import Device
from sg4v_jax.infer.prepare import AnyRequest, Prepared, Preparer
from sg4v_jax.infer.queue import Queue
from sg4v_jax.infer.request import Prompt, Request, Result, ScoreRequest, ScoreResult
from sg4v_jax.infer.sampling import SamplingOptions
from sg4v_jax.infer.state import FOUND, NOTHING, SEARCHING, Prefix
from sg4v_jax.infer.stats import Stats
from sg4v_jax.parallel import rules

# Kernels read the cache in blocks of whole lanes.
CAPACITY_MULTIPLE = 128


class Engine:
    """A model ready to answer.

    Attributes:
      bundle: the model.
      tokenizer: its tokenizer.
      slots: rows that decode together.
      memory: what the engine takes of it.
      stats: what was done so far.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype | str = "bfloat16",
        *,
        weights: str = "float",
        kv: str = "float",
        slots: int = 16,
        capacity: int = 2048,
        num_beams: int = 1,
        prefill_rows: int = 4,
        steps: int = 4,
        memory_limit: int | None = None,
    ):
        """Places the parameters on `mesh` and makes room for the slots.

        Args:
          bundle: see `convert.load.load_model`.
          mesh: where to run: `tensor` for latency, `data` for throughput. Slots are spread over the
            batch axes and rounded up to fill them.
          dtype: what to compute in.
          weights, kv: `int8` for the decoder's matrices, or for keys and values: half the memory of
            bfloat16 and half the time to read it, for a little accuracy (docs/inference.md). `float` is
            `dtype`.
          slots: rows that decode together: requests, or beams of them.
          num_beams: most beams of a request. With more than one, every request takes so many slots.
          capacity: positions of a slot, images included; at most the model's.
          prefill_rows: prompts that are prefilled together.
          steps: tokens per slot that one program generates. More of them cost slots that end early,
            fewer cost the host.
          memory_limit: bytes that one device may give; by default, what it says that it has.

        Raises:
          ValueError: if the bundle has no tokenizer, or the slots don't fit into memory.
        """
        for name, kind in (("weights", weights), ("kv", kv)):
            if kind not in ("float", "int8"):
                raise ValueError(f"{name}={kind!r} is neither 'float' nor 'int8'")
        if bundle.tokenizer_file is None:
            raise ValueError("the model directory holds no tokenizer.model; put the model's own there")
        self.bundle, self.tokenizer = bundle, Tokenizer(bundle.tokenizer_file)
        ways = rules.ways("batch", mesh)
        each = ways * num_beams
        self.slots = -(-slots // each) * each
        capacity = min(capacity, bundle.config.text.max_positions)
        self._stop_ids = self._find_stop_ids()
        self._preparer = Preparer(bundle, self.tokenizer, capacity, num_beams)
        self._device = Device(
            bundle,
            mesh,
            jnp.dtype(dtype),
            weights=weights,
            kv=kv,
            memory_limit=memory_limit,
            groups=self.slots // num_beams,
            num_beams=num_beams,
            capacity=-(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE,
            rows=-(-min(prefill_rows, self.slots // num_beams) // ways) * ways,
            steps=steps,
            vocab=self.tokenizer.vocab_size,
            stop_ids=self._stop_ids,
        )
        self.memory = self._device.memory
        self.stats = Stats(self._device.groups)
        self._busy = False

    def complete(self, requests: Iterable[Request | None]) -> Iterator[Result]:
        """Answers requests, in the order in which the answers are done.

        Args:
          requests: any number; pulled as there is room for them, never more than the slots and a few
            batches of prefilling ahead of what is answered. None says that there is nothing for now:
            whoever waits for requests to come gives it as long as answers are under way.

        A request that can't be answered (an image that can't be read, too many tokens) gives a result
        that says why. An answer depends on nothing but its request.

        Raises:
          RuntimeError: if the engine is in the midst of another call.
        """
        for new in self._run(requests):
            if isinstance(new, Result):
                yield new
            elif new.completion is not None:
                yield Result(new.request.key, new.completion, "")

    def stream(self, prompt: Prompt, options: SamplingOptions) -> Iterator[str]:
        """Yields the answer to one prompt piece by piece, as it is decoded.

        Raises:
          ValueError: if the prompt can't be answered.
        """
        shown = ""
        for new in self._run([Request(0, prompt, options)]):
            if isinstance(new, Result):
                raise ValueError(new.error)
            text = new.text_so_far()
            if text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """The probabilities of given answers: the choices of a question share one prefilled prompt.

        Args:
          requests: any number, pulled a few batches ahead of what is returned.

        Results come as they are done. A request that can't be scored gives one that says why.

        Raises:
          RuntimeError: if the engine is in the midst of another call.
        """
        with self._queue(requests) as queue:
            running: deque[tuple[list[Prepared[ScoreRequest]], jax.Array]] = deque()
            while not queue.empty or running:
                for refused in queue.pull():
                    yield ScoreResult(refused.request.key, (), (), refused.error)
                batch = queue.take(self._device.rows)
                if batch:
                    running.append((batch, self._device.score(batch)))
                elif not running:
                    queue.wait()
                if running and (not batch or len(running) > 1):
                    yield from self._read_scores(*running.popleft())

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Positions that a prompt takes, image features included.

        Raises:
          ValueError: if the prompt can't be answered.
        """
        return len(self._preparer.encode(prompt))

    def _read_scores(self, batch: list[Prepared[ScoreRequest]], scores: jax.Array) -> Iterator[ScoreResult]:
        for prepared, row in zip(batch, np.asarray(scores), strict=False):
            lengths = tuple(map(len, prepared.choices))
            yield ScoreResult(prepared.request.key, tuple(row[: len(lengths)].tolist()), lengths, "")

    def _run(self, requests: Iterable[Request | None]) -> Iterator[Answer | Result]:
        """Yields answers whenever they have grown, and results of requests that can't have one."""
        with self._queue(requests) as queue:
            yield from _Run(self, queue).answers()

    @contextlib.contextmanager
    def _queue(self, requests: Iterable[AnyRequest | None]) -> Iterator[Queue[AnyRequest]]:
        """The engine is one call's alone."""
        if self._busy:
            raise RuntimeError("the engine is in the midst of another call; finish or close that first")
        self._busy = True
        queue = Queue(requests, self._preparer, ahead=3 * self._device.rows)
        try:
            yield queue
        finally:
            queue.close()
            self._busy = False

    def _find_stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: </s>, and the newline that ends a plain caption."""
        newline = stop_string(get_template(self.bundle.template)) == "\n"
        return (self.tokenizer.eos_id, *([self.tokenizer.encode("\n")[-1]] if newline else []))


@dataclasses.dataclass
class _Steps:
    """Steps that the device is at: their tokens to come, and whose they are."""

    tokens: jax.Array
    log_probabilities: jax.Array
    owners: list[Answer | None]


class _Run:
    """One call of the engine: which group of slots has which answer, and what waits."""

    def __init__(self, engine: Engine, queue: Queue[Request]):
        self._engine, self._device, self._stats = engine, engine._device, engine.stats
        self._queue = queue
        self._owners: list[Answer | None] = [None] * self._device.groups
        self._waiting: deque[tuple[Prefix, dict[int, Answer]]] = deque()
        self._running: deque[_Steps] = deque()

    def answers(self) -> Iterator[Answer | Result]:
        while True:
            for refused in self._queue.pull():
                yield Result(refused.request.key, None, refused.error)
            with self._stats.timed("host_seconds"):
                self._admit()
                in_use = any(owner is not None for owner in self._owners)
                if in_use:
                    self._running.append(_Steps(*self._device.decode(), list(self._owners)))
            if not in_use and not self._running:
                if self._queue.empty:
                    return
                self._queue.wait()
            # The device has the next steps before anybody looks at these.
            elif not in_use or len(self._running) > 1:
                yield from self._read(self._running.popleft())

    def _admit(self) -> None:
        """Gives free slots to prompts that wait, and prefills more of them if none does."""
        while True:
            free = deque(group for group, owner in enumerate(self._owners) if owner is None)
            while free and self._waiting:
                prefix, rows = self._waiting[0]
                groups = [self._device.groups] * self._device.rows
                for row in list(rows)[: len(free)]:
                    groups[row] = free.popleft()
                    self._owners[groups[row]] = rows.pop(row)
                self._device.insert(prefix, groups)
                if not rows:
                    self._waiting.popleft()
            batch = self._queue.take(self._device.rows) if free else []
            if not batch:
                return
            engine = self._engine
            answers = [Answer(p.request, engine.tokenizer, engine._stop_ids) for p in batch]
            self._waiting.append((self._device.prefill(batch), dict(enumerate(answers))))
            self._stats.prefills += 1
            self._stats.requests += len(batch)

    def _read(self, steps: _Steps) -> Iterator[Answer]:
        """Adds tokens to answers and frees the slots of those that are done."""
        with self._stats.timed("wait_seconds"):
            tokens, log_probabilities = np.asarray(steps.tokens), np.asarray(steps.log_probabilities)
        with self._stats.timed("host_seconds"):
            # A group's answer is in its first slot.
            width = self._engine.slots // self._device.groups
            tokens, log_probabilities = tokens[:, ::width], log_probabilities[:, ::width]
            grown = []
            used = tokens != NOTHING
            self._stats.steps += int(used.any(1).sum())
            # As lists at once: a call of NumPy for each slot would take longer than all the rest.
            columns = zip(used.sum(0).tolist(), tokens.T.tolist(), log_probabilities.T.tolist(), strict=True)
            for group, (answer, (count, new, found)) in enumerate(zip(steps.owners, columns, strict=True)):
                # It may have ended in the steps before these.
                if answer is None or answer.completion is not None:
                    continue
                new = new[:count]
                self._stats.tokens += count
                if new and new[-1] == FOUND:
                    answer.take_beam(*self._device.best_beam(group))
                elif not new or new[-1] != SEARCHING:
                    answer.take(new, found[:count])
                grown.append(answer)
                if answer.completion is not None:
                    self._owners[group] = None
        yield from grown
