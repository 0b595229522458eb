"""Several datasets as one endless order of records.

The order is a function of the configuration and the seed alone. Any position of it can be looked up, so
any process, thread or worker can read its share without asking another.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from sg4v_jax.data.records import Record


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset of a mixture.

    With neither `weight` nor `epochs`, each record is seen once in an epoch of the mixture.

    Attributes:
      directory: where `data.build` put it.
      weight: share of the mixture, relative to the other weights; all sources have one or none has.
        An epoch of the mixture then has as many records as all sources together.
      epochs: how often each record is seen in an epoch of the mixture; may be a fraction.
      template, prompt, aspect: as in `data.sample.SampleFormat`; None takes what the run says.
    """

    directory: str
    weight: float = 0.0
    epochs: float = 0.0
    template: str | None = None
    prompt: str | None = None
    aspect: str | None = None


@dataclasses.dataclass(frozen=True)
class Replacement:
    """Some of a source's captions replaced by other captions of the same images (spec 7.16).

    Attributes:
      source: whose captions go.
      directory: the dataset whose captions come.
      share: how many of the source's caption records are replaced, from 0 to 1.
      question: a regular expression; records whose question it is found in are caption records. They
        also have one image and one answer.
    """

    source: str
    directory: str
    share: float
    question: str


@dataclasses.dataclass(frozen=True)
class Replaced:
    """Which records a `Replacement` replaces.

    Attributes:
      records: record of the source -> record of the other dataset.
      captions: how many caption records the source has.
      matched: how many of them the other dataset has a caption for.
    """

    records: Mapping[int, int]
    captions: int
    matched: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a position of the mixture is read.

    Attributes:
      source: name of the source.
      record: its number there; or in the dataset of the `Replacement`, if `replaced`.
    """

    source: str
    record: int
    replaced: bool = False


class Mixture:
    """`mixture[position]` for positions from 0, without end. Picklable.

    Each epoch is a new random order of all draws of all sources. Draws of a source go through its
    records in turn, so that after k rounds each has been seen k times, even if a round ends within an
    epoch.

    Attributes:
      draws: how many records of each source an epoch has.
      epoch: how many records an epoch has.
      fingerprint: tells orders apart that are not the same.
    """

    def __init__(
        self,
        records: Mapping[str, int],
        sources: Mapping[str, Source],
        seed: int,
        replaced: tuple[str, Replaced] | None = None,
    ):
        """Args:
        records: number of records of each source.
        sources: the sources by name; their order does not matter.
        seed: decides the order.
        replaced: a source's name, and which of its records are replaced.
        """
        self._names = sorted(sources)
        self.draws = draws(records, sources)
        self.epoch = sum(self.draws.values())
        self._seed, self._records = seed, {name: records[name] for name in self._names}
        self._replaced_source = replaced[0] if replaced else ""
        self._replaced = dict(replaced[1].records) if replaced else {}
        replacements = [self._replaced_source, sorted(self._replaced.items())]
        identity = [seed, self._records, self.draws, replacements]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def __getitem__(self, position: int) -> Place:
        epoch, slot = position // self.epoch, _shuffled(position, self.epoch, self._seed, "")
        for name in self._names:
            if slot < self.draws[name]:
                break
            slot -= self.draws[name]
        draw = epoch * self.draws[name] + slot
        record = _shuffled(draw, self._records[name], self._seed, name)
        if name == self._replaced_source and record in self._replaced:
            return Place(name, self._replaced[record], replaced=True)
        return Place(name, record)


def draws(records: Mapping[str, int], sources: Mapping[str, Source]) -> dict[str, int]:
    """How many records of each source an epoch of the mixture has, by name in alphabetical order.

    Raises:
      ValueError: if a source has both a weight and epochs or one below zero, if only some have weights,
        or if a source is empty.
    """
    for name, source in sources.items():
        where = f"config.data.sources.{name}"
        if source.weight and source.epochs:
            raise ValueError(
                f"{where} has weight={source.weight} and epochs={source.epochs}; set one of them"
            )
        if source.weight < 0 or source.epochs < 0:
            raise ValueError(f"{where}: weight and epochs can't be below 0; leave the source out instead")
        if not records[name]:
            raise ValueError(f"{where}: the dataset at {source.directory} has no records")
    names = sorted(sources)
    weighted = [name for name in names if sources[name].weight]
    if not weighted:
        return {name: max(1, round(records[name] * (sources[name].epochs or 1.0))) for name in names}
    if len(weighted) < len(names):
        missing = ", ".join(name for name in names if name not in weighted)
        raise ValueError(
            f"config.data.sources.{weighted[0]} has a weight but {missing} has none; give every source one, "
            "or say it with epochs"
        )
    total, weights = sum(records.values()), sum(sources[name].weight for name in names)
    exact = {name: total * sources[name].weight / weights for name in names}
    result = {name: max(1, int(exact[name])) for name in names}
    # What rounding down left over goes where it rounded most.
    for name in sorted(names, key=lambda name: int(exact[name]) - exact[name]):
        if sum(result.values()) < total:
            result[name] += 1
    return result


def find_replaced(
    source: Iterable[Record], captions: Iterable[Record], replacement: Replacement, seed: int
) -> Replaced:
    """Chooses the records to replace, by the path of their image.

    The choice is a hash of seed, path and record: a larger share replaces the same ones and more.

    Args:
      source: all records of the source, in order.
      captions: all records of the dataset that replaces them, in order. Of several records of an image
        the first counts.
      replacement: how many, and of which.
      seed: decides which.

    Raises:
      ValueError: if `share` is not from 0 to 1, or `question` is no regular expression.
    """
    if not 0 <= replacement.share <= 1:
        raise ValueError(f"config.data.replace.share={replacement.share} is not from 0 to 1")
    try:
        question = re.compile(replacement.question)
    except re.error as error:
        message = f"config.data.replace.question={replacement.question!r}: {error}"
        raise ValueError(message) from error
    by_image: dict[str, int] = {}
    for index, record in enumerate(captions):
        if len(record.images) == 1:
            by_image.setdefault(record.images[0], index)
    count, candidates = 0, []
    for index, record in enumerate(source):
        if len(record.images) == 1 and len(record.turns) == 2 and question.search(record.turns[0].text):
            count += 1
            image = record.images[0]
            if image in by_image:
                rank = hashlib.sha256(f"{seed}/{image}/{index}".encode()).digest()
                candidates.append((rank, index, by_image[image]))
    chosen = sorted(candidates)[: round(replacement.share * count)]
    return Replaced({index: other for _, index, other in sorted(chosen)}, count, len(candidates))


@functools.lru_cache(maxsize=256)
def _keys(seed: int, name: str, epoch: int) -> tuple[int, ...]:
    """Of one order: independent for every seed, source and round."""
    digest = hashlib.sha256(f"{seed}/{name}/{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 32, 8))


def _shuffled(index: int, size: int, seed: int, name: str) -> int:
    """0..size-1 in random order, and in another one each time around, by index.

    A Feistel network on the bits of the index: each step changes one half by a hash of the other, which
    can be undone, so no two indices meet. What falls outside of the range goes through once more.
    """
    epoch, index = divmod(index, size)
    bits = (size - 1).bit_length()
    low = bits // 2
    low_mask, high_mask = (1 << low) - 1, (1 << bits - low) - 1
    keys = _keys(seed, name, epoch)
    while True:
        high, rest = index >> low, index & low_mask
        for key in keys:
            high ^= _hash(rest ^ key) & high_mask
            rest ^= _hash(high ^ key) & low_mask
        index = high << low | rest
        if index < size:
            return index


def _hash(value: int) -> int:
    """Thirty-two well mixed bits (the finaliser of splitmix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value >> 32
