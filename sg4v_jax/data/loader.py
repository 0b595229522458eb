"""Datasets to batches: mix, decode, pack and batch, with a state that resumes to the bit."""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import grain
import jax

from sg4v_jax.data import batch, build, packing
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import RecordError
from sg4v_jax.data.sample import SampleFormat, Skipped, make_sample
from sg4v_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    Attributes:
      directory: where `data.build` put it.
      weight: share of the mixture; 0 means its number of records.
    """

    directory: str
    weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What a run reads.

    Attributes:
      sources: the mixture, by name.
      form: how records become samples.
      batch_size: rows per batch, over all processes.
      packing: several samples per row; off puts one sample in a row, as the original does.
      packing_bins: rows filled at a time.
      seed: decides the order.
      num_threads: threads that decode.
    """

    sources: Mapping[str, Source]
    form: SampleFormat
    batch_size: int
    packing: bool
    packing_bins: int
    seed: int
    num_threads: int


class Loader:
    """An endless, resumable stream of batches for this process.

    Attributes:
      num_records: records of all sources together.
      skipped: bad records passed over so far by this process.
    """

    def __init__(self, config: LoaderConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self._datasets = {name: build.open_dataset(s.directory) for name, s in config.sources.items()}
        self.num_records = sum(len(dataset) for dataset in self._datasets.values())
        self.skipped = Skipped()
        self._any_good = False
        processes = jax.process_count()
        if config.batch_size % processes:
            raise ValueError(f"batch_size {config.batch_size} does not divide by {processes} processes")

    def __iter__(self) -> grain.DatasetIterator:
        """An iterator over `batch.Batch`es of numpy arrays; `grain.checkpoint` saves its state."""
        config = self._config
        # Each process takes every n-th record of one global order.
        samples = self._mixture()[jax.process_index() :: jax.process_count()]
        samples = samples.map(lambda element: self._sample(*element))
        options = grain.ReadOptions(num_threads=config.num_threads)
        rows = packing.pack(
            samples.to_iter_dataset(options),
            length=config.form.length,
            image_slots=config.form.image_slots,
            bins=config.packing_bins,
            max_samples=None if config.packing else 1,
        )
        batches = rows.batch(config.batch_size // jax.process_count(), drop_remainder=True)
        return iter(batches.map(batch.from_packed))

    def steps_per_epoch(self, probe: int = 256) -> int:
        """Batches that see every record about once.

        With packing the number of rows is not known beforehand; it is estimated from the token and
        image counts of `probe` records spread evenly over each source.
        """
        config = self._config
        if not config.packing:
            return math.ceil(self.num_records / config.batch_size)
        rows = 0.0
        for name, dataset in self._datasets.items():
            step = max(1, len(dataset) // probe)
            samples = [self._sample(name, dataset[i], i) for i in range(0, len(dataset), step)]
            fills = [
                max(len(s["tokens"]) / config.form.length, len(s["images"]) / config.form.image_slots)
                for s in samples
                if s is not None
            ]
            rows += len(dataset) * sum(fills) / max(1, len(fills))
        return max(1, math.ceil(rows / config.batch_size))

    def _mixture(self) -> grain.MapDataset:
        """Elements (source name, stored example, index), shuffled anew in each epoch."""
        parts, weights = [], []
        for offset, (name, dataset) in enumerate(self._datasets.items()):
            part = grain.MapDataset.range(len(dataset)).shuffle(seed=self._config.seed + offset)
            read = functools.partial(_read, name, dataset)
            parts.append(part.repeat(None).map(read))
            weights.append(self._config.sources[name].weight or float(len(dataset)))
        return grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]

    def _sample(self, name: str, example: dict[str, Any], index: int) -> dict[str, Any] | None:
        """The encoded sample, or None (which Grain passes over) if the record is bad."""
        try:
            record, images = build.decode_example(example, source=name, index=index)
            sample = make_sample(record, images, self._config.form, self._tokenizer)
        except (RecordError, ImageError) as error:
            if self.skipped.add(error):
                log.warning("skipping a record of %s: %s", name, error)
            if not self._any_good and self.skipped.total >= self.num_records:
                # Or the search for a good one would go on forever.
                raise ValueError(f"no record of {', '.join(self._datasets)} can be used: {error}") from error
            return None
        self._any_good = True
        return sample


def _read(name: str, dataset: Any, index: int) -> tuple[str, dict[str, Any], int]:
    return name, dataset[index], index
