"""Datasets to batches: mix, decode, pack and batch, with a state that resumes to the bit."""

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import logging
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax

from sg4v_jax.data import packing
from sg4v_jax.data.batch import Batch, from_rows, to_devices
from sg4v_jax.data.elements import Elements, Positions
from sg4v_jax.data.mixture import Replacement, Source
from sg4v_jax.data.reader import Element, Reader
from sg4v_jax.data.sample import SampleFormat
from sg4v_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Counts = dict[str, dict[str, int]]
USED = ("used", "replaced", "cut")
"""What the counts of a source say of records that were used; every other key is a reason why one was not."""


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What a run reads.

    Attributes:
      sources: the mixture, by name.
      form: how records become samples.
      batch_size: rows per batch, over all processes.
      packing: several samples per row; off puts one sample in a row, as the original does.
      packing_window: samples that wait for a row at a time; more waste less and hold more images in
        host memory.
      seed: decides the order.
      num_threads: threads that decode, in each worker or in this process.
      num_workers: processes that decode; 0 does it in this one.
      prefetch: batches held ready on the devices.
      worker_timeout: seconds without a record after which worker processes are taken for stuck and started
        again; ten times as many for their start.
      replacement: captions to replace.
    """

    sources: Mapping[str, Source]
    form: SampleFormat
    batch_size: int
    packing: bool
    packing_window: int
    seed: int
    num_threads: int
    num_workers: int = 0
    prefetch: int = 2
    worker_timeout: float = 600.0
    replacement: Replacement | None = None

    @property
    def window(self) -> int:
        """Samples that wait for a row at a time: one, where each has a row of its own."""
        return self.packing_window if self.packing else 1

    @property
    def budgets(self) -> dict[str, int]:
        """What a row has room for, as `packing` takes it."""
        return {"length": self.form.length, "image_slots": self.form.image_slots}


class Loader:
    """An endless, resumable stream of batches for this process.

    Attributes:
      num_records: records of all sources together.
    """

    def __init__(self, config: LoaderConfig, tokenizer: Tokenizer, shard: tuple[int, int] | None = None):
        """Args:
        config: what to read.
        tokenizer: the text tokenizer.
        shard: (index, count) of the readers that share the stream (see `parallel.mesh.row_shard`);
          None: each process is one.
        """
        self._config = config
        self.shard = shard or (jax.process_index(), jax.process_count())
        if config.batch_size % self.shard[1]:
            raise ValueError(f"batch_size {config.batch_size} does not divide by {self.shard[1]} processes")
        self._reader = Reader(config.sources, config.form, tokenizer, config.seed, config.replacement)
        self.num_records = self._reader.num_records
        for name, draws in self._reader.mixture.draws.items():
            log.info("an epoch has %s samples of %s", f"{draws:,}", name)

    def __iter__(self) -> "BatchIterator":
        """An iterator over `batch.Batch`es of numpy arrays; `grain.checkpoint` saves its state."""
        return BatchIterator(self._config, self._reader, self.shard)

    def on_devices(self, mesh: jax.sharding.Mesh) -> grain.DatasetIterator:
        """The same, some batches ahead and on the mesh. The state is that of the last batch handed out."""
        batches = _Batches(self).map(lambda batch: to_devices(batch, mesh))
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=self._config.prefetch)
        )

    def steps_per_epoch(self, probe: int = 1024) -> int:
        """Batches that take one epoch of the mixture.

        With packing the number of rows is not known beforehand; it is estimated by packing the first
        `probe` samples, without their images. It is the same for any number of processes.
        """
        config, epoch = self._config, self._reader.mixture.epoch
        if not config.packing:
            return math.ceil(epoch / config.batch_size)
        positions = range(max(probe, 8 * config.packing_window))
        found = self._reader.sizes(positions, config.num_threads)
        sizes = [size for size in found if size is not None]
        rows = placed = 0
        for row in packing.pack(sizes, _same, window=config.packing_window, **config.budgets):
            if rows and placed + config.packing_window > len(sizes):
                break  # From here on the window drains; a long run hardly sees that.
            rows, placed = rows + 1, placed + len(row)
        per_record = rows / max(1, placed) * len(sizes) / len(found)
        return max(1, math.ceil(epoch * per_record / config.batch_size))

    def samples(self, state: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """Which samples are in this process's part of a batch; it reads them again.

        Args:
          state: of the iterator, before the batch.

        Returns:
          For each row its samples: `source`, `record` (index in it), `id`, and whether it was `replaced`.
        """
        config = dataclasses.replace(self._config, num_workers=0)
        with contextlib.closing(BatchIterator(config, self._reader, self.shard)) as batches:
            batches.set_state(state)
            rows = batches.next_rows()
        return [[self._reader.describe(element["position"]) for element in row] for row in rows]

    def resharded(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state with which this process goes on where others stopped: its own, if they shared the
        stream as it is shared now.

        Args:
          states: of all processes of the run that stopped, in any order. Those that read the same rows
            have the same.
        """
        by_shard = {tuple(state["shard"]): state for state in states}
        if self.shard in by_shard:
            return by_shard[self.shard]
        state = reshard(list(by_shard.values()), self.shard)
        (index, count), old = self.shard, states[0]["shard"][1]
        log.warning(
            "reader %d of %d goes on where %d readers stopped: no record is read twice and none left "
            "out, but rows and batches are others (%d records that waited for a row come first)",
            index,
            count,
            old,
            len(state["leftover"]),
        )
        return state


class _Batches(grain.IterDataset):
    """A `Loader` as Grain wants it."""

    def __init__(self, loader: Loader):
        super().__init__()
        self._loader = loader

    def __iter__(self) -> "BatchIterator":
        return iter(self._loader)


class BatchIterator(grain.DatasetIterator):
    """See `Loader.__iter__`.

    The processes share one sequence of positions in the mixture: `leftover`, then all from `start` on.
    Each takes every n-th. Its state says how many of its own it has read, and which of those still wait
    for a row; they are read again on resuming. Nothing in it depends on threads or workers.
    """

    def __init__(self, config: LoaderConfig, reader: Reader, shard: tuple[int, int]):
        super().__init__()
        self._config, self._reader, self._shard = config, reader, shard
        self._rows, self._sources = config.batch_size // shard[1], sorted(config.sources)
        self._budgets, self._window = config.budgets, config.window
        self._elements: Elements | None = None
        self._waiting: list[Element] = []
        self._dropped_in_a_row = 0
        self._reset(_first_state(reader, shard))

    def __next__(self) -> Batch:
        rows = [[self._sample(element) for element in row] for row in self.next_rows()]
        form = self._config.form
        return from_rows(rows, form.length, form.image_slots, form.image_size)

    def next_rows(self) -> list[list[Element]]:
        """What the next batch is made of."""
        if self._pending:
            self._read_again()
        return [self._next_row() for _ in range(self._rows)]

    def get_state(self) -> dict[str, Any]:
        """JSON-able; the position after the last batch, and the counts until there."""
        waiting = self._pending or [element["position"] for element in self._waiting]
        return copy.deepcopy(self._state | {"pending": waiting})

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after the batch at which `get_state` was called.

        Raises:
          ValueError: if it is the state of another process, or of another number of them.
        """
        if tuple(state["shard"]) != self._shard:
            raise ValueError(
                f"the state is of process {state['shard'][0]} of {state['shard'][1]}, this is "
                f"{self._shard[0]} of {self._shard[1]}; use Loader.resharded"
            )
        if state["order"] != self._reader.mixture.fingerprint:
            log.warning(
                "the data is not what this run began with (sources, their records, weights or seed): it goes "
                "on at the same position of another order, so records may be read twice or not at all"
            )
        self._reset(state | {"order": self._reader.mixture.fingerprint})

    def close(self) -> None:
        """Ends threads and worker processes."""
        super().close()
        self._close_elements()

    def _close_elements(self) -> None:
        if self._elements is not None:
            self._elements.close()
            self._elements = None

    def _reset(self, state: dict[str, Any]) -> None:
        self._close_elements()
        self._state = copy.deepcopy(state)
        self._pending: list[int] = self._state.pop("pending")
        self._waiting = []

    def _sample(self, element: Element) -> dict[str, Any]:
        return element["sample"] | {"source": self._sources.index(element["source"])}

    def _next_row(self) -> list[Element]:
        while len(self._waiting) < self._window:
            element = self._next_element()
            if "dropped" in element:
                self._drop(element)
            else:
                self._dropped_in_a_row = 0
                self._waiting.append(element)
        row = packing.take_row(self._waiting, operator.itemgetter("size"), **self._budgets)
        for element in row:
            self._count(element, "used")
            if element["replaced"]:
                self._count(element, "replaced")
            if element["sample"]["cut"]:
                self._count(element, "cut")
        return row

    def _next_element(self) -> Element:
        config, state = self._config, self._state
        if self._elements is None:
            positions = Positions(state["leftover"], state["start"], self._shard)
            self._elements = Elements(
                self._reader,
                positions,
                state["read"],
                num_threads=config.num_threads,
                num_workers=config.num_workers,
                worker_timeout=config.worker_timeout,
            )
        element = next(self._elements)
        state["read"] += 1
        return element

    def _drop(self, element: Element) -> None:
        if self._count(element, element["dropped"]) == 1:
            log.warning("leaving out a record of %s: %s", element["source"], element["error"])
        self._dropped_in_a_row += 1
        if self._dropped_in_a_row >= self._reader.mixture.epoch:
            # Or the search for a good one would go on forever.
            names = ", ".join(self._config.sources)
            raise ValueError(f"no record of {names} can be used: {element['error']}")

    def _count(self, element: Element, what: str) -> int:
        counts = self._state["counts"].setdefault(element["source"], {})
        counts[what] = counts.get(what, 0) + 1
        return counts[what]

    def _read_again(self) -> None:
        """What waited for a row when the state was taken."""
        with concurrent.futures.ThreadPoolExecutor(max(1, self._config.num_threads)) as pool:
            elements = list(pool.map(self._reader, self._pending))
        for element in elements:
            if "dropped" in element:
                log.warning("left out on resuming, though it was good before: %s", element["error"])
        self._waiting = [element for element in elements if "sample" in element]
        self._pending = []


def reshard(states: Sequence[dict[str, Any]], shard: tuple[int, int]) -> dict[str, Any]:
    """A `BatchIterator` state for one of a new number of processes.

    What the old processes had not put into a batch, up to the last position that any of them had read,
    is dealt out first; then the order goes on.

    Args:
      states: those of all old processes.
      shard: (index, count) of the new process.

    Raises:
      ValueError: if one is missing or they are not of the same moment.
    """
    states = sorted(states, key=lambda state: state["shard"][0])
    first = states[0]
    count = first["shard"][1]
    if [tuple(state["shard"]) for state in states] != [(i, count) for i in range(count)]:
        found = ", ".join(str(state["shard"][0]) for state in states)
        raise ValueError(f"the data state of {count} processes is needed; found those of {found}")
    if any(state[key] != first[key] for state in states for key in ("order", "leftover", "start")):
        raise ValueError("the data states of the processes are not of one run")
    end = max(i + state["read"] * count for i, state in enumerate(states))
    unread = [n for i, state in enumerate(states) for n in range(i + state["read"] * count, end, count)]
    # All of `leftover` is dealt out anew, read or not.
    unread += range(end, len(first["leftover"]))
    positions = Positions(first["leftover"], first["start"])
    places = [positions[n] for n in unread]
    pending = [position for state in states for position in state["pending"]]
    total: collections.defaultdict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for state in states:
        for name, counts in state["counts"].items():
            total[name].update(counts)
    return first | {
        "shard": list(shard),
        "leftover": sorted(pending + places),
        "start": first["start"] + max(0, end - len(first["leftover"])),
        "read": 0,
        "pending": [],
        "counts": {name: dict(counts) for name, counts in total.items()} if shard[0] == 0 else {},
    }


def dropped(counts: Counts) -> int:
    """How many records were left out, of all that `BatchIterator` counted."""
    return sum(n for source in counts.values() for what, n in source.items() if what not in USED)


def _first_state(reader: Reader, shard: tuple[int, int]) -> dict[str, Any]:
    order = {"order": reader.mixture.fingerprint, "shard": list(shard), "leftover": [], "start": 0}
    return order | {"read": 0, "pending": [], "counts": {}}


def _same(size: tuple[int, int]) -> tuple[int, int]:
    return size
