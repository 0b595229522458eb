"""From a position of the mixture to a sample: what threads and worker processes do. Free of JAX."""

import concurrent.futures
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sg4v_jax.data import build
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.mixture import Mixture, Place, Replacement, Source, find_replaced
from sg4v_jax.data.records import Record, RecordError
from sg4v_jax.data.sample import SampleError, SampleFormat, encode_sample, make_sample
from sg4v_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# What a position holds: `position`, `source` and `replaced`; then `sample` and its `size` (tokens, images),
# or for a record that can't be used `dropped` (the reason it is counted as) and `error`.
Element = dict[str, Any]


class Reader:
    """`reader(position)` reads, decodes and encodes the record at a position of the mixture. Picklable.

    Attributes:
      mixture: which record that is.
      num_records: records of all sources together.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        form: SampleFormat,
        tokenizer: Tokenizer,
        seed: int,
        replacement: Replacement | None = None,
    ):
        """Args:
        sources: the mixture, by name.
        form: how records become samples, where a source does not say otherwise.
        tokenizer: the text tokenizer.
        seed: decides the order.
        replacement: captions to replace.
        """
        self._tokenizer = tokenizer
        self._forms = {name: _form_of(source, form) for name, source in sources.items()}
        self._datasets = {name: build.open_dataset(source.directory) for name, source in sources.items()}
        records = {name: len(dataset) for name, dataset in self._datasets.items()}
        self.num_records = sum(records.values())
        replaced = None
        if replacement is not None:
            if replacement.source not in sources:
                raise ValueError(
                    f"config.data.replace.source={replacement.source!r} is not in config.data.sources; "
                    f"there are {', '.join(sorted(sources))}"
                )
            self._captions = build.open_dataset(replacement.directory)
            replaced = (replacement.source, self._find_replaced(replacement, seed))
        self.mixture = Mixture(records, sources, seed, replaced)

    def __call__(self, position: int) -> Element:
        place = self.mixture[position]
        element = {"position": position, "source": place.source, "replaced": place.replaced}
        try:
            record, images = self._read(place)
            form = self._forms[place.source]
            sample = make_sample(record, images, form, self._tokenizer)
        except (RecordError, ImageError) as error:
            return element | {"dropped": reason(error), "error": str(error)}
        return element | {"sample": sample, "size": (len(sample["tokens"]), len(sample["images"]))}

    def size(self, position: int) -> tuple[int, int] | None:
        """(tokens, images) of the sample at a position, without decoding images; None for a bad record."""
        place = self.mixture[position]
        try:
            record, _ = self._read(place)
            encoded = encode_sample(record, self._forms[place.source], self._tokenizer)
        except RecordError:
            return None
        return len(encoded.tokens), encoded.images

    def sizes(self, positions: Sequence[int], num_threads: int) -> list[tuple[int, int] | None]:
        """`size` of each position, by threads."""
        with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
            return list(pool.map(self.size, positions))

    def describe(self, position: int) -> dict[str, Any]:
        """Which record a position holds: `source`, `record` (index in it), `id`, `replaced`."""
        place = self.mixture[position]
        record, _ = self._read(place)
        return {
            "source": place.source,
            "record": place.record,
            "id": record.id,
            "replaced": place.replaced,
        }

    def _read(self, place: Place) -> tuple[Record, list[bytes]]:
        dataset = self._captions if place.replaced else self._datasets[place.source]
        return build.decode_example(dataset[place.record], source=place.source, index=place.record)

    def _find_replaced(self, replacement: Replacement, seed: int) -> Any:
        source = self._datasets[replacement.source]
        log.info(
            "looking for captions to replace among %s records of %s", f"{len(source):,}", replacement.source
        )
        found = find_replaced(
            _records(source, replacement.source), _records(self._captions, "replace"), replacement, seed
        )
        log.info(
            "replacing %d of %d captions of %s (asked for: %.1f %%) by those at %s, which has one for %d",
            len(found.records),
            found.captions,
            replacement.source,
            100 * replacement.share,
            replacement.directory,
            found.matched,
        )
        if len(found.records) < round(replacement.share * found.captions):
            log.warning("fewer captions replaced than asked for: the others' images have no new caption")
        return found


def reason(error: Exception) -> str:
    """What a record that can't be used is counted as."""
    if isinstance(error, SampleError):
        return error.reason
    return "bad image" if isinstance(error, ImageError) else "bad record"


def _form_of(source: Source, form: SampleFormat) -> SampleFormat:
    own = {name: getattr(source, name) for name in ("template", "prompt", "aspect")}
    return dataclasses.replace(form, **{name: value for name, value in own.items() if value is not None})


def _records(dataset: Any, name: str) -> Iterator[Record]:
    for index in range(len(dataset)):
        yield build.decode_example(dataset[index], source=name, index=index)[0]
