"""The loader: epochs, mixtures, state, and what a batch holds in the end."""

import collections
import dataclasses
from typing import Any

import grain
import jax
import numpy as np
import pytest

from sg4v_jax.data.build import decode_example, open_dataset
from sg4v_jax.data.loader import Loader, LoaderConfig, Source
from sg4v_jax.data.sample import SampleFormat, make_sample
from sg4v_jax.data.tokenizer import Tokenizer
from tests.conftest import TinyWorld

FORM = SampleFormat(
    template="v1", aspect="pad", prompt="", image_size=12, image_tokens=4, length=512, image_slots=2
)


def loader(world: TinyWorld, **changes: Any) -> Loader:
    config = LoaderConfig(
        sources={"mix": Source(str(world.mix))},
        form=FORM,
        batch_size=3,
        packing=True,
        packing_bins=4,
        seed=7,
        num_threads=2,
    )
    return Loader(dataclasses.replace(config, **changes), Tokenizer(world.tokenizer))


def samples_of(batches: Any, count: int) -> list[bytes]:
    """The tokens of the first `count` samples, in order."""
    found: list[bytes] = []
    while len(found) < count:
        batch = next(batches)
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            found += [tokens[segments == i].tobytes() for i in range(1, segments.max() + 1)]
    return found


def expected_samples(world: TinyWorld, dataset: Any, **changes: Any) -> collections.Counter[bytes]:
    tokenizer, records = Tokenizer(world.tokenizer), open_dataset(dataset)
    form = dataclasses.replace(FORM, **changes)
    return collections.Counter(
        make_sample(*decode_example(records[i], "mix", i), form, tokenizer)["tokens"].tobytes()
        for i in range(len(records))
    )


@pytest.mark.parametrize("threads", [0, 2])
def test_every_sample_once_in_each_epoch(tiny_world: TinyWorld, threads: int) -> None:
    """In another order each time. One sample a row, so that the end of an epoch is a position."""
    one = loader(tiny_world, packing=False, batch_size=1, packing_bins=1, num_threads=threads)
    expected = expected_samples(tiny_world, tiny_world.mix)
    n = sum(expected.values())
    assert n == one.num_records == one.steps_per_epoch()
    found = samples_of(iter(one), 2 * n)
    first, second = found[:n], found[n : 2 * n]
    assert collections.Counter(first) == collections.Counter(second) == expected
    assert first != second


def test_packing_loses_no_sample(tiny_world: TinyWorld) -> None:
    expected = expected_samples(tiny_world, tiny_world.mix)
    n = sum(expected.values())
    # Open rows hold back samples of the epoch's end; two epochs later all of it has come out.
    found = collections.Counter(samples_of(iter(loader(tiny_world)), 3 * n))
    assert found.keys() == expected.keys()
    for sample, count in expected.items():
        assert abs(found[sample] - 3 * count) <= count


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("after", [1, 5])
def test_state_resumes_to_the_bit(tiny_world: TinyWorld, packing: bool, after: int) -> None:
    captions = {"mix": Source(str(tiny_world.mix)), "captions": Source(str(tiny_world.captions))}
    make = lambda: iter(loader(tiny_world, packing=packing, sources=captions))  # noqa: E731
    batches = make()
    for _ in range(after):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(4)]
    again = make()
    again.set_state(state)
    for batch in expected:
        assert equal(next(again), batch)
    assert isinstance(again, grain.DatasetIterator)


def test_seed_decides_the_order(tiny_world: TinyWorld) -> None:
    first = [next(iter(loader(tiny_world, seed=seed))) for seed in (7, 7, 8)]
    assert equal(first[0], first[1])
    assert not equal(first[0], first[2])


@pytest.mark.parametrize(
    ("weights", "share"), [((0.0, 0.0), None), ((1.0, 1.0), 0.5), ((3.0, 1.0), 0.75), ((1.0, 9.0), 0.1)]
)
def test_mixture_follows_the_weights(
    tiny_world: TinyWorld, weights: tuple[float, float], share: float | None
) -> None:
    """0 means the number of records."""
    directories = (tiny_world.captions, tiny_world.mix)
    captions, mix = (expected_samples(tiny_world, directory).keys() for directory in directories)
    captions = captions - mix  # One caption in four is in the mix as well.
    sources = {
        name: Source(str(directory), weight)
        for name, directory, weight in zip(("captions", "mix"), directories, weights, strict=True)
    }
    records = [len(open_dataset(directory)) for directory in directories]
    share = records[0] / sum(records) if share is None else share
    mixed = loader(tiny_world, sources=sources, packing=False, batch_size=1, packing_bins=1)
    assert mixed.num_records == sum(records)
    found = samples_of(iter(mixed), 300)
    only_captions = share * len(captions) / records[0]
    assert abs(sum(sample in captions for sample in found) / 300 - only_captions) < 0.06


def test_steps_per_epoch_estimates_the_packed_rows(tiny_world: TinyWorld) -> None:
    packed = loader(tiny_world)
    n = sum(expected_samples(tiny_world, tiny_world.mix).values())
    batches, seen, steps = iter(packed), 0, 0
    while seen < n:
        seen += int(next(batches).segment_ids.max(axis=1).sum())
        steps += 1
    assert abs(packed.steps_per_epoch() - steps) <= 0.25 * steps + 1


def test_records_that_teach_nothing_are_skipped_and_counted(tiny_world: TinyWorld) -> None:
    """What is longer than a row is cut; without a supervised token left, the record is out."""
    lengths = sorted(len(tokens) // 4 for tokens in expected_samples(tiny_world, tiny_world.mix))
    # The prompt alone is about as long as the shortest records.
    limit = lengths[0] - 1
    some = loader(tiny_world, form=dataclasses.replace(FORM, length=limit))
    batches = iter(some)
    for _ in range(20):
        assert next(batches).tokens.shape == (3, limit)
    assert some.skipped.total > 0
    ((kind, found),) = some.skipped.summary().items()
    assert kind == "RecordError" and f"no supervised token within data.seq_len={limit}" in found["first"]
    assert found["count"] == some.skipped.total


@pytest.mark.parametrize("packing", [False, True])
def test_an_unusable_dataset_is_an_error(tiny_world: TinyWorld, packing: bool) -> None:
    """Not an endless search for a good record."""
    none = loader(tiny_world, form=dataclasses.replace(FORM, length=8), packing=packing)
    with pytest.raises(ValueError, match=r"no record of mix can be used: .* within data\.seq_len=8"):
        next(iter(none))


def test_a_missing_dataset_says_what_to_do(tiny_world: TinyWorld) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dataset at /nowhere: build one with `sg4v data build`"):
        loader(tiny_world, sources={"mix": Source("/nowhere")})
