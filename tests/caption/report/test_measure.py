"""Reading and measuring, against plain Python and numpy."""

import itertools
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_jax.caption.report.captions import Caption, Skipped, read_captions
from sg4v_jax.caption.report.measure import COLUMNS, FLAGS, measure, numbers
from sg4v_jax.caption.report.phrases import KINDS, count_phrases, find_phrases, tokenize
from sg4v_jax.caption.report.report import length_numbers, repeated_captions, source_numbers
from sg4v_jax.caption.report.sample import fetch, ranked
from tests.caption.report.conftest import DENSE, SHORT, llava, write_json, write_lines

NAMES = COLUMNS.names[3:]


def measured(text: str, finished: bool | None = None) -> dict[str, int]:
    return dict(zip(NAMES, numbers(Caption("a.jpg", text, finished)), strict=True))


def flags(text: str, finished: bool | None = None) -> set[str]:
    found = measured(text, finished)
    return {name for name in FLAGS if found[name]}


# --- Reading -------------------------------------------------------------------------------------


def test_every_kind_of_file(tmp_path: pathlib.Path) -> None:
    answer = {"event": "answer", "image": "a/3.jpg", "caption": "Three.", "verdict": "accepted"}
    refused = {**answer, "caption": "I'm sorry.", "verdict": "refusal"}
    write_lines(tmp_path / "collected/results.jsonl", [{"event": "ask"}, refused, answer])
    write_json(tmp_path / "llava.json", [llava("a/1.jpg", " One. "), {"id": "x", "conversations": []}])
    shards = tmp_path / "captioned/shards"
    write_lines(shards / "captions-00001-of-00002.jsonl", [{"image": "a/5.jpg", "caption": "Five."}])
    failed = {"image": "a/9.jpg", "error": "unreadable"}
    four = {"image": "a/4.jpg", "caption": "Four", "finished": False}
    write_lines(shards / "captions-00000-of-00002.jsonl", [four, failed, {"image": "a/8.jpg", "caption": 8}])
    skipped = Skipped()
    paths = [tmp_path / "llava.json", tmp_path / "collected", tmp_path / "captioned"]
    found = list(read_captions(paths, skipped))
    assert found == [
        Caption("a/1.jpg", "One."),
        Caption("a/3.jpg", "Three."),
        Caption("a/4.jpg", "Four", False),
        Caption("a/5.jpg", "Five."),
    ]
    assert skipped.counts == {"no image": 1, "answer rejected: refusal": 1, "error": 1, "no caption": 1}
    assert "00000-of-00002.jsonl: record 1, line 2" in skipped.examples["error"]
    assert measure(paths[2:]).name == str(paths[2]), "what was given, not the first shard in it"


def test_broken_entries_are_counted_and_text_that_no_file_can_hold_is_mended(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"image": "a.jpg", "caption": "half \\ud83d."}\n{"image": \n[1]\n')
    skipped = Skipped()
    assert [caption.text for caption in read_captions([file], skipped)] == ["half \ufffd."]
    assert skipped.counts == {"broken": 1, "no object": 1}


@pytest.mark.parametrize("name, content, message", [
    ("none.json", None, "no such file"),
    ("folder", "folder", "holds none of"),
    ("text.json", "[]", "no captions in it"),
])  # fmt: skip
def test_nothing_to_read(tmp_path: pathlib.Path, name: str, content: str | None, message: str) -> None:
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        measure([tmp_path / name])


# --- Lengths, sources, samples -------------------------------------------------------------------


def test_lengths_are_numpys(two_sets: tuple[pathlib.Path, pathlib.Path]) -> None:
    captions = measure([two_sets[0]])
    texts = [caption.text for caption in read_captions([two_sets[0]])]
    for unit, count in {"characters": len, "words": lambda text: len(text.split())}.items():
        values = np.array([count(text) for text in texts])
        assert (captions.table[unit] == values).all()
        found = length_numbers(captions.table, unit)
        assert found["mean"] == pytest.approx(values.mean()) and found["max"] == values.max()
        assert found["median"] == np.percentile(values, 50, method="inverted_cdf")
    assert set(captions.table["sentences"]) == {4}
    by_source = source_numbers(captions)
    assert {name: row["captions"] for name, row in by_source.items()} == {"coco": 6, "sam": 6}
    assert by_source["sam"]["characters"] == np.mean([len(t) for t in texts[6:]])
    assert by_source["sam"]["hedge"] == 1 and by_source["sam"]["mood"] == 0


def test_a_table_longer_than_a_block_is_in_order(tmp_path: pathlib.Path) -> None:
    lines = [{"image": f"s{i % 3}/{i}.jpg", "caption": "word " * (i % 50)} for i in range(4201)]
    lines.append({"image": "s0/0.jpg", "caption": "once more"})
    captions = measure([write_lines(tmp_path / "x.jsonl", lines)])
    assert captions.table["words"].tolist() == [i % 50 for i in range(4201)] + [2]
    assert captions.sources == ("s0", "s1", "s2")
    assert len(captions.first_of_image()) == 4201 and 4201 not in captions.first_of_image()
    assert repeated_captions(captions.table) == 4201 - 50  # Empty captions are equal, too.
    found = fetch(captions, [4201, 4096, 0, 4199])
    assert [len(found[row].text.split()) for row in (0, 4096, 4199)] == [0, 46, 49]
    assert found[4201] == Caption("s0/0.jpg", "once more")


def test_a_sample_depends_on_images_and_seed_alone(tmp_path: pathlib.Path) -> None:
    lines = [{"image": f"a/{i}.jpg", "caption": str(i)} for i in range(500)]
    forward = measure([write_lines(tmp_path / "a.jsonl", lines)])
    backward = measure([write_lines(tmp_path / "b.jsonl", [*lines[::-1], *lines[:10]])])
    rows = [ranked(of.table, of.first_of_image(), seed=3) for of in (forward, backward)]
    assert rows[0].tolist() == (499 - rows[1]).tolist()
    assert rows[0].tolist() != ranked(forward.table, np.arange(500), seed=4).tolist()
    # Every place is about equally likely: the mean of 100 of 0..499 is within 5 standard errors.
    assert abs(rows[0][:100].mean() - 249.5) < 5 * 500 / np.sqrt(12 * 100)


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path: pathlib.Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"image": "a.jpg", "caption": "One."}])
    captions = measure([file])
    write_lines(file, [{"image": "a.jpg", "caption": "Two."}])
    with pytest.raises(ValueError, match="changed while"):
        fetch(captions, [0])


# --- Flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    (DENSE, set()),
    ('He said: "Stop!"', set()),
    ("", {"empty"}),
    ("I'm sorry, but I can't describe people.", {"refusal"}),
    ("A dog on a", {"open end"}),
    ("A dog (brown", {"open end"}),
    ("no no no no no.", set()),
    ("No, no. " * 5 + "No, no.", {"repetition"}),
    ("a red chair, " * 3 + "a red chair.", {"repetition"}),
    ("a red chair and a red chair and a red desk.", set()),
    ("A cat sits there. It sleeps. A cat sits there. It sleeps.", set()),
    ("A cat sits there. It sleeps. A cat  sits there. It purrs. A cat sits there.", {"repetition"}),
])  # fmt: skip
def test_flags(text: str, expected: set[str]) -> None:
    assert flags(text) == expected


def test_cut_off_is_what_the_file_says() -> None:
    assert flags("A dog.", finished=False) == {"cut off"}
    assert flags("A dog.", finished=True) == set()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=24))
def test_repeated_trigrams_are_those_of_the_definition(words: list[str]) -> None:
    found = measured(" ".join(words))
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    assert found["trigrams"] == len(trigrams)
    assert found["repeated"] == sum(trigram in trigrams[:i] for i, trigram in enumerate(trigrams))


# --- Phrases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    (DENSE, {"writing": 2, "hedge": 1, "count": 1}),
    (SHORT, {}),
    ("It seems that there might be rain, as if in May.", {"hedge": 3}),
    ("Five dogs, six cats, twenty-one mice and 7 birds in 2019 on route 1234.", {"count": 3}),
    ("Mr. Bean and actor Tom Hanks meet a king of spades. The actor is named Tom.", {"person": 3}),
    ("He plays the character. The end.", {}),
    ("The peaceful atmosphere conveys a sense of calm.", {"mood": 3}),
    ("There are no people, and the dog’s tail is out of frame.", {"unseen": 2}),
])  # fmt: skip
def test_phrases(text: str, expected: dict[str, int]) -> None:
    counts = dict(zip(KINDS, count_phrases(text, tokenize(text)), strict=True))
    assert {kind: count for kind, count in counts.items() if count} == expected
    kinds = [kind for *_, kind in find_phrases(text)]
    assert set(kinds) == set(expected)


PIECES = [phrase for kind in KINDS.values() for phrase in kind.phrases[:6]]
PIECES += ['"', "“x”", "King Lear", ".", "<b>"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12).map(" ".join))
def test_marks_never_overlap_and_fit_the_counts(text: str) -> None:
    spans = find_phrases(text)
    assert all(first < end for first, end, _ in spans)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))
    counts = dict(zip(KINDS, count_phrases(text, tokenize(text)), strict=True))
    for kind in KINDS:
        assert sum(found == kind for *_, found in spans) <= counts[kind]
    assert bool(spans) == any(counts.values())
