"""The order of records: complete, even, the same for everybody, and captions replaced by image."""

import collections
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_jax.data.mixture import Mixture, Replaced, Replacement, Source, draws, find_replaced
from sg4v_jax.data.records import Record, Turn

QUESTION = "(?i)describe"

# (records, kind of proportion, its value) of each source.
SOURCES = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0, 2.5])), min_size=1, max_size=4
)
WEIGHTED = st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 9)), min_size=1, max_size=4)


def by_epochs(shapes: list[tuple[int, float]]) -> tuple[dict[str, int], dict[str, Source]]:
    records = {f"s{i}": size for i, (size, _) in enumerate(shapes)}
    return records, {f"s{i}": Source(f"d{i}", epochs=epochs) for i, (_, epochs) in enumerate(shapes)}


@settings(deadline=None, max_examples=50)
@given(SOURCES, st.integers(0, 2**31))
def test_each_epoch_draws_each_source_as_often_as_it_says(shapes: list[tuple[int, float]], seed: int) -> None:
    records, sources = by_epochs(shapes)
    mixture = Mixture(records, sources, seed)
    for name, source in sources.items():
        assert abs(mixture.draws[name] - records[name] * (source.epochs or 1)) <= 1
    seen: collections.Counter[tuple[str, int]] = collections.Counter()
    for epoch in range(3):
        places = [mixture[i] for i in range(epoch * mixture.epoch, (epoch + 1) * mixture.epoch)]
        assert collections.Counter(place.source for place in places) == mixture.draws
        assert not any(place.replaced for place in places)
        seen.update((place.source, place.record) for place in places)
        # Records of a source have been seen equally often at any epoch's end, but for the round under way.
        for name, size in records.items():
            rounds, more = divmod((epoch + 1) * mixture.draws[name], size)
            expected = [rounds + 1] * more + [rounds] * (size - more)
            assert sorted((seen[name, i] for i in range(size)), reverse=True) == expected


@settings(deadline=None, max_examples=50)
@given(WEIGHTED)
def test_weights_are_shares_of_the_epoch(shapes: list[tuple[int, float]]) -> None:
    records = {f"s{i}": size for i, (size, _) in enumerate(shapes)}
    sources = {f"s{i}": Source("d", weight=weight) for i, (_, weight) in enumerate(shapes)}
    found, total = draws(records, sources), sum(records.values())
    weights = sum(weight for _, weight in shapes)
    for name, source in sources.items():
        assert found[name] >= 1
        assert abs(found[name] - total * source.weight / weights) <= len(shapes)
    assert total <= sum(found.values()) < total + len(shapes)


@settings(deadline=None, max_examples=50)
@given(SOURCES, st.integers(0, 99), st.integers(1, 7))
def test_the_order_does_not_know_who_reads_it(shapes: list[tuple[int, float]], seed: int, hosts: int) -> None:
    """Nor in which order, nor which copy of it, nor in which order the sources were named."""
    records, sources = by_epochs(shapes)
    mixture = Mixture(records, sources, seed)
    whole = [mixture[i] for i in range(60)]
    backwards = dict(reversed(sources.items()))
    other = pickle.loads(pickle.dumps(Mixture(records, backwards, seed)))
    assert other.fingerprint == mixture.fingerprint
    slices = [[other[i] for i in reversed(range(host, 60, hosts))][::-1] for host in range(hosts)]
    assert [slices[i % hosts][i // hosts] for i in range(60)] == whole


def test_the_seed_and_the_epoch_change_the_order() -> None:
    records, sources = by_epochs([(30, 0.0), (20, 0.0)])
    orders = [[Mixture(records, sources, seed)[i] for i in range(100)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:50] != orders[0][50:]
    assert Mixture(records, sources, 0).fingerprint != Mixture(records, sources, 1).fingerprint
    assert Mixture({"s0": 30, "s1": 21}, sources, 0).fingerprint != Mixture(records, sources, 0).fingerprint


def test_sources_are_mixed_throughout() -> None:
    records, sources = by_epochs([(1000, 0.0), (1000, 0.0)])
    mixture = Mixture(records, sources, 3)
    for part in range(0, 2000, 500):
        share = sum(mixture[i].source == "s0" for i in range(part, part + 500)) / 500
        assert 0.4 < share < 0.6


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": Source("x", weight=1, epochs=2)}, r"sources\.a has weight=1 and epochs=2; set one"),
        ({"a": Source("x", weight=1), "b": Source("y")}, r"sources\.a has a weight but b has none"),
        ({"a": Source("x", weight=-1)}, r"sources\.a: weight and epochs can't be below 0"),
        ({"empty": Source("x")}, r"sources\.empty: the dataset at x has no records"),
    ],
)
def test_impossible_mixtures(sources: dict[str, Source], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draws({"a": 3, "b": 4, "empty": 0}, sources)


# Replacing.


def captions(count: int, step: int = 1, question: str = "Describe it.") -> list[Record]:
    turns = (Turn("human", f"<image>\n{question}"), Turn("gpt", "A cat."))
    return [Record(str(i), (f"coco/{i}.jpg",), turns) for i in range(0, count, step)]


def others() -> list[Record]:
    """What is no caption: without image, with two, of several turns, with another question."""
    turns = (Turn("human", "Describe it."), Turn("gpt", "No."))
    return [
        Record("text", (), turns),
        Record("two", ("coco/0.jpg", "coco/1.jpg"), turns),
        Record("long", ("coco/0.jpg",), turns + turns),
        *captions(3, question="What is the cat's name?"),
    ]


def replace(share: float, source: list[Record], dense: list[Record], seed: int = 0) -> Replaced:
    return find_replaced(source, dense, Replacement("base", "dense", share, QUESTION), seed)


def test_replaced_records_keep_their_image() -> None:
    source = others() + captions(40)
    dense = list(reversed(captions(40)))
    found = replace(0.25, source, dense)
    assert (found.captions, found.matched, len(found.records)) == (40, 40, 10)
    for record, other in found.records.items():
        assert source[record].images == dense[other].images
        assert record >= len(others())


def test_a_larger_share_replaces_the_same_and_more() -> None:
    source = captions(100)
    shares = [set(replace(share, source, captions(100)).records) for share in (0, 0.1, 0.5, 1)]
    assert [len(share) for share in shares] == [0, 10, 50, 100]
    assert shares[0] <= shares[1] <= shares[2] <= shares[3]
    assert shares[1] != set(replace(0.1, source, captions(100), seed=1).records)


def test_captions_without_a_counterpart_stay() -> None:
    found = replace(0.8, captions(100), captions(100, step=2))
    assert (found.captions, found.matched, len(found.records)) == (100, 50, 50)
    assert all(record % 2 == 0 for record in found.records)


def test_of_several_captions_of_an_image_the_first_counts() -> None:
    found = replace(1, captions(3), captions(3) + captions(3))
    assert found.records == {0: 0, 1: 1, 2: 2}


def test_the_mixture_hands_out_the_other_record_in_the_same_place() -> None:
    records, sources = by_epochs([(10, 0.0), (10, 0.0)])
    plain = Mixture(records, sources, 5)
    changed = Mixture(records, sources, 5, ("s1", Replaced({2: 77, 4: 88}, 10, 2)))
    assert changed.fingerprint != plain.fingerprint
    for i in range(40):
        before, after = plain[i], changed[i]
        if before.source == "s1" and before.record in (2, 4):
            assert after.replaced and after.record == {2: 77, 4: 88}[before.record]
            assert after.source == "s1"
        else:
            assert after == before


def test_impossible_replacements() -> None:
    with pytest.raises(ValueError, match=r"replace\.share=1\.5 is not from 0 to 1"):
        replace(1.5, [], [])
    with pytest.raises(ValueError, match=r"replace\.question='\('"):
        find_replaced([], [], Replacement("a", "b", 0.5, "("), 0)
