"""Held-out records: each once, the same for any number of readers."""

import collections
import dataclasses
import logging
import os
from typing import Any

import numpy as np
import pytest

from sg4v_jax.data.batch import Batch
from sg4v_jax.data.held_out import HeldOut
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.loader import LoaderConfig
from sg4v_jax.data.mixture import Source
from sg4v_jax.data.tokenizer import Tokenizer
from tests.conftest import TinyWorld
from tests.data.test_loader import FORM, expected_samples

CONFIG = LoaderConfig(
    sources={}, form=FORM, batch_size=4, packing=True, packing_window=8, seed=0, num_threads=2
)


def held_out(world: TinyWorld, records: int = 0, shard: tuple[int, int] = (0, 1), **changes: Any) -> HeldOut:
    config = dataclasses.replace(CONFIG, sources={"mix": Source(os.fspath(world.mix))}, **changes)
    return HeldOut(config, Tokenizer(world.tokenizer), records, shard)


def samples(batches: list[Batch]) -> list[bytes]:
    return [
        tokens[segments == i].tobytes()
        for batch in batches
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True)
        for i in range(1, segments.max() + 1)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_each_record_once_whoever_reads(tiny_world: TinyWorld, packing: bool) -> None:
    alone = held_out(tiny_world, packing=packing)
    whole = list(alone)
    expected = expected_samples(tiny_world, tiny_world.mix)
    assert collections.Counter(samples(whole)) == expected
    assert alone.num_records == expected.total()
    assert all(np.array_equal(a.images, b.images) for a, b in zip(whole, alone, strict=True))
    # The last batch has empty rows, or this would not show what becomes of them.
    assert not whole[-1].segment_ids[-1].any()
    for count in (2, 4):
        parts = [list(held_out(tiny_world, 0, (i, count), packing=packing)) for i in range(count)]
        for batch, *shares in zip(whole, *parts, strict=True):
            for field in dataclasses.fields(Batch):
                joined = np.concatenate([getattr(share, field.name) for share in shares])
                assert np.array_equal(joined, getattr(batch, field.name)), field.name


def test_a_few_of_them(tiny_world: TinyWorld) -> None:
    few = held_out(tiny_world, 5)
    assert few.num_records == 5
    assert set(samples(list(few))) < set(samples(list(held_out(tiny_world))))


def test_what_can_t_be_used_is_left_out_and_told(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A record too long for a row is known beforehand, a picture that can't be read is not."""
    form = dataclasses.replace(FORM, too_long="drop", max_tokens=100)
    lengths = [len(tokens) // 4 for tokens in expected_samples(tiny_world, tiny_world.mix).elements()]
    short = sum(length <= 100 for length in lengths)
    assert 0 < short < len(lengths)
    with caplog.at_level(logging.WARNING, "sg4v_jax"):
        fitting = held_out(tiny_world, form=form)
    assert fitting.num_records == short
    assert f"leaving out {len(lengths) - short} of {len(lengths)} held-out records: " in caplog.text

    with pytest.raises(ValueError, match="no record of mix can be used: "):
        held_out(tiny_world, form=dataclasses.replace(form, max_tokens=1))

    def refuse(*_: Any, **__: Any) -> None:
        raise ImageError("a torn picture")

    monkeypatch.setattr("sg4v_jax.data.sample.load_image", refuse)
    caplog.clear()
    batches = list(fitting)
    assert all(batch.image_index.max() == -1 for batch in batches)
    assert caplog.text.count("leaving out a held-out record: a torn picture") == short - len(samples(batches))
