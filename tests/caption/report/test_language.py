"""What is taken from words: parts of speech against hand-tagged sentences, n-grams against a plain count."""

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg4v_jax.caption.report import language
from sg4v_jax.caption.report.language import PARTS, composition, distinct, openings, parts_of_speech

# Tagged by hand: n noun, a adjective, d adverb, v verb, p preposition, # numeral, - anything else.
BY_HAND = """
The/- young/a woman/n with/p long/a brown/a hair/n stands/v on/p a/- sunny/a beach/n ./
Two/# large/a red/a umbrellas/n are/v visible/a behind/p her/- ,/ and/- the/- sky/n is/v clear/a ./
A/- small/a dog/n runs/v quickly/d across/p the/- green/a field/n towards/p a/- wooden/a fence/n ./
In/p the/- background/n ,/ there/- are/v several/- tall/a buildings/n and/- a/- stone/n bridge/n ./
The/- image/n shows/v a/- plate/n of/p food/n that/- contains/v rice/n and/- fresh/a vegetables/n ./
The/- man/n is/v wearing/v a/- blue/a shirt/n and/- does/v n't/- look/v at/p the/- camera/n ./
Three/# white/a boats/n float/v peacefully/d near/p the/- old/a harbor/n of/p the/- town/n ./
A/- vase/n with/p colorful/a flowers/n has/v been/v placed/v in/p the/- center/n of/p the/- table/n ./
"""
LETTERS = dict(
    zip("navdp#-", ["noun", "adjective", "verb", "adverb", "preposition", "numeral", "other"], strict=True)
)


def by_hand() -> list[list[tuple[str, str]]]:
    tokens = [[token.rsplit("/", 1) for token in line.split()] for line in BY_HAND.split("\n") if line]
    return [[(word, LETTERS[tag]) for word, tag in line if tag] for line in tokens]


def test_parts_of_speech_agree_with_hand_tagged_sentences() -> None:
    wrong = total = 0
    for sentence in by_hand():
        text = " ".join(word for word, _ in sentence).replace(" n't", "n't") + "."
        found = parts_of_speech(text)
        assert [word for word, _ in found] == [word for word, _ in sentence]
        total += len(sentence)
        wrong += sum(ours != theirs for (_, ours), (_, theirs) in zip(found, sentence, strict=True))
    assert total > 90 and wrong <= 0.05 * total


def test_composition_is_the_share_of_words_with_an_interval_over_captions() -> None:
    texts = [" ".join(word for word, _ in sentence).replace(" n't", "n't") + "." for sentence in by_hand()]
    found = composition(texts)
    assert found is not None and found.captions == len(texts)
    tagged = [part for text in texts for _, part in parts_of_speech(text)]
    assert found.words == len(tagged) and sum(found.shares.values()) == pytest.approx(1)
    for part in (*PARTS, "other"):
        assert found.shares[part] == pytest.approx(tagged.count(part) / len(tagged))
    # The same captions four times: half the interval.
    more = composition(texts * 4)
    assert more is not None and more.shares == pytest.approx(found.shares)
    assert more.half_widths["noun"] == pytest.approx(found.half_widths["noun"] / 2)


def test_without_the_extra_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "HanTa", None)
    language._tagger.cache_clear()
    try:
        assert composition(["A dog."]) is None
        with pytest.raises(ImportError, match=r"pip install 'sg4v_jax\[report\]'"):
            parts_of_speech("A dog.")
    finally:
        monkeypatch.undo()
        language._tagger.cache_clear()


@given(st.lists(st.text(alphabet="ab ’-.\n", max_size=30), max_size=6), st.integers(1, 3), st.integers(0, 40))
def test_distinct_is_the_plain_count(texts: list[str], n: int, words: int) -> None:
    grams, left = [], words
    for text in texts:
        tokens = language.tokenize(text)[:left]
        left -= len(tokens)
        grams += [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert distinct(texts, n, words) == (len(set(grams)) / max(1, len(grams)), len(grams))


def test_distinct_and_openings_of_captions() -> None:
    texts = ["A red cat.", "a red dog, a RED dog", "The end"]
    assert distinct(texts, 1) == (6 / 11, 11)
    assert distinct(texts, 2) == (5 / 8, 8)
    assert openings(texts, words=2) == [("a red", 2 / 3), ("the end", 1 / 3)]
    assert language.count_tokens(itertools.chain(texts, texts)) == 22
