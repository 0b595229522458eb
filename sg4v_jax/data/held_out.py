"""Held-out records as batches: each once, and the same rows however many processes read them."""

import contextlib
import logging
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from sg4v_jax.data import packing
from sg4v_jax.data.batch import Batch, from_rows
from sg4v_jax.data.elements import Elements, Positions
from sg4v_jax.data.loader import LoaderConfig
from sg4v_jax.data.reader import Reader
from sg4v_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class HeldOut:
    """Each `iter` reads the same records again, as numpy batches of this process's rows.

    The last batch may end with empty rows. A record that can't be used is left out, with a warning.

    Attributes:
      num_records: how many are read.
    """

    def __init__(self, config: LoaderConfig, tokenizer: Tokenizer, num_records: int, shard: tuple[int, int]):
        """Args:
        config: what to read and how; threads read it, `num_workers` is not used.
        tokenizer: the text tokenizer.
        num_records: the first of them in the order of `config.seed`; 0 for all.
        shard: (index, count) of the readers that share each batch (see `parallel.mesh.row_shard`).

        Raises:
          ValueError: no record can be used.
        """
        self._config, self._shard = config, shard
        self._reader = Reader(config.sources, config.form, tokenizer, config.seed)
        # All records stand in the first epoch once.
        positions = range(min(num_records or self._reader.num_records, self._reader.num_records))
        sizes = self._reader.sizes(positions, config.num_threads)
        samples = [(position, size) for position, size in zip(positions, sizes, strict=True) if size]
        self.num_records = len(samples)
        if self.num_records < len(positions):
            bad = next(position for position, size in zip(positions, sizes, strict=True) if not size)
            error = self._reader(bad)["error"]
            if not samples:
                raise ValueError(f"no record of {', '.join(config.sources)} can be used: {error}")
            log.warning(
                "leaving out %d of %d held-out records: %s",
                *(len(positions) - self.num_records, len(positions), error),
            )
        rows = packing.pack(samples, operator.itemgetter(1), window=config.window, **config.budgets)
        # This process's part of each batch.
        self._rows: list[list[int]] = []
        all_rows, (index, count) = [[position for position, _ in row] for row in rows], shard
        share = config.batch_size // count
        for start in range(0, len(all_rows), config.batch_size):
            batch = all_rows[start : start + config.batch_size]
            own = batch[index * share : (index + 1) * share]
            self._rows += own + [[]] * (share - len(own))

    def __iter__(self) -> Iterator[Batch]:
        config, share = self._config, self._config.batch_size // self._shard[1]
        order = Positions([position for row in self._rows for position in row], start=0)
        # Threads only: a worker process takes longer to start than to read what is held out.
        elements = Elements(
            self._reader,
            order,
            0,
            num_threads=config.num_threads,
            num_workers=0,
            worker_timeout=config.worker_timeout,
        )
        with contextlib.closing(elements):
            for start in range(0, len(self._rows), share):
                rows = [self._samples(elements, row) for row in self._rows[start : start + share]]
                form = config.form
                yield from_rows(rows, form.length, form.image_slots, form.image_size)

    def _samples(self, elements: Elements, row: Sequence[int]) -> list[dict[str, Any]]:
        samples = []
        for _ in row:
            element = next(elements)
            if "sample" in element:
                samples.append(element["sample"])
            else:
                log.warning("leaving out a held-out record: %s", element["error"])
        return samples
