"""Every position knows its sample's source and modality, whatever it is packed with."""

import dataclasses

import jax
import pytest

from sg4v_jax.data.batch import kind_names
from sg4v_jax.data.mixture import Source
from tests.conftest import TinyWorld
from tests.data.test_loader import expected_samples, loader


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_kinds_of_a_mixture(tiny_world: TinyWorld, shard: tuple[int, int]) -> None:
    # The sources are told apart by what their samples look like.
    sources = {
        "mix": Source(str(tiny_world.mix)),
        "captions": Source(str(tiny_world.captions), template="plain"),
    }
    names = kind_names(sources)
    assert names == [("captions", "text"), ("captions", "image"), ("mix", "text"), ("mix", "image")]
    of_source = {
        "captions": expected_samples(tiny_world, tiny_world.captions, template="plain"),
        "mix": expected_samples(tiny_world, tiny_world.mix),
    }
    batches, found, shared = iter(loader(tiny_world, shard, sources=sources, batch_size=4)), set(), 0
    for _ in range(12):
        batch = next(batches)
        arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        for row in range(len(batch.tokens)):
            one = jax.tree.map(lambda x, row=row: x[row], arrays)
            kinds = set()
            for segment in range(1, one["segment_ids"].max() + 1):
                inside = one["segment_ids"] == segment
                (kind,) = set(one["kinds"][inside].tolist())
                source, modality = names[kind]
                assert one["tokens"][inside].tobytes() in of_source[source]
                assert (modality == "image") == (one["image_index"][inside] >= 0).any()
                kinds.add(kind)
            assert not one["kinds"][one["segment_ids"] == 0].any()
            found |= kinds
            shared += len(kinds) > 1
    assert found == {1, 2, 3} and shared, "rows must mix sources and modalities"
