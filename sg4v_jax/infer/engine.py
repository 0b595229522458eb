"""The one engine: chat, bulk captioning and evaluation all generate with it.

A fixed number of slots decode together; a finished one is given the next prompt at once (continuous
batching). Prompts are read by threads ahead of need, prefilled several at a time, and wait on the device
for a slot. What a decoding program returns is fetched while the next one runs, so that the device never
waits for the host.
"""

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
from sg4v_jax.infer.prepare import Preparer
from sg4v_jax.infer.queue import Queue
from sg4v_jax.infer.request import Prompt, Request, Result
from sg4v_jax.infer.sampling import SamplingOptions
from sg4v_jax.infer.state import NOTHING, Prefix
from sg4v_jax.infer.stats import Stats
from sg4v_jax.parallel import rules

# Kernels read the cache in blocks of whole lanes.
CAPACITY_MULTIPLE = 128


class Engine:
    """A model ready to answer.

    Attributes:
      bundle: the model.
      tokenizer: its tokenizer.
      slots: requests that decode together.
      stats: what was done so far.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype | str = "bfloat16",
        *,
        slots: int = 16,
        capacity: int = 2048,
        prefill_rows: int = 4,
        steps: int = 4,
    ):
        """Places the parameters on `mesh` and makes room for the slots.

        Args:
          bundle: see `convert.load.load_model`.
          mesh: where to run: `tensor` for latency, `data` for throughput. Slots are spread over the
            batch axes and rounded up to fill them.
          dtype: what to compute in.
          slots: requests that decode together.
          capacity: positions of a slot, images included; at most the model's.
          prefill_rows: prompts that are prefilled together.
          steps: tokens per slot that one program generates. More of them cost slots that end early,
            fewer cost the host.

        Raises:
          ValueError: if the bundle has no tokenizer.
        """
        if bundle.tokenizer_file is None:
            raise ValueError("the model directory holds no tokenizer.model; put the model's own there")
        self.bundle, self.tokenizer = bundle, Tokenizer(bundle.tokenizer_file)
        ways = rules.batch_ways(mesh)
        self.slots = -(-slots // ways) * ways
        capacity = min(capacity, bundle.config.text.max_positions)
        self._stop_ids = self._find_stop_ids()
        self._preparer = Preparer(bundle, self.tokenizer, capacity, max_beams=1)
        self._device = Device(
            bundle,
            mesh,
            jnp.dtype(dtype),
            slots=self.slots,
            capacity=-(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE,
            rows=-(-min(prefill_rows, slots) // ways) * ways,
            steps=steps,
            vocab=self.tokenizer.vocab_size,
            stop_ids=self._stop_ids,
        )
        self.stats = Stats(self.slots)
        self._busy = False

    def complete(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Answers requests, in the order in which the answers are done.

        Args:
          requests: any number; pulled as there is room for them, never more than the slots and a few
            batches of prefilling ahead of what is answered.

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

    def _run(self, requests: Iterable[Request]) -> Iterator[Answer | Result]:
        """Yields answers whenever they have grown, and results of requests that can't have one."""
        if self._busy:
            raise RuntimeError("the engine is in the midst of another call; finish or close that first")
        self._busy = True
        queue = Queue(requests, self._preparer, ahead=3 * self._device.rows)
        try:
            yield from _Run(self, queue).answers()
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
    """One call of the engine: which slot has which answer, and what waits."""

    def __init__(self, engine: Engine, queue: Queue[Request]):
        self._engine, self._device, self._stats = engine, engine._device, engine.stats
        self._queue = queue
        self._owners: list[Answer | None] = [None] * engine.slots
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
            free = deque(slot for slot, owner in enumerate(self._owners) if owner is None)
            while free and self._waiting:
                prefix, rows = self._waiting[0]
                slots = [self._engine.slots] * self._device.rows
                for row in list(rows)[: len(free)]:
                    slots[row] = free.popleft()
                    self._owners[slots[row]] = rows.pop(row)
                self._device.insert(prefix, slots)
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
            grown = []
            used = tokens != NOTHING
            self._stats.steps += int(used.any(1).sum())
            for slot, answer in enumerate(steps.owners):
                # A stop string may have ended it since; the device doesn't know of those.
                if answer is None or answer.completion is not None:
                    continue
                count = int(used[:, slot].sum())
                answer.take(tokens[:count, slot].tolist(), log_probabilities[:count, slot].tolist())
                self._stats.tokens += count
                grown.append(answer)
                if answer.completion is not None:
                    self._owners[slot] = None
        yield from grown
