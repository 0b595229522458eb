"""What needs the words of captions: parts of speech, distinct n-grams, how captions begin.

These are taken from a sample. Parts of speech come from HanTa, a tagger in plain Python that brings its
English model along (Wartena 2019; the extra `report`); its tags are the C5 tags of the British National
Corpus.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sg4v_jax.caption.report.phrases import tokenize

HOW_TO_GET = "pip install 'sg4v_jax[report]'"
# Parts of speech of the paper's table, by the beginnings of C5 tags.
PARTS = {
    "noun": ("NN", "NP"),
    "adjective": ("AJ", "ORD"),
    "adverb": ("AV",),
    "verb": ("VB", "VD", "VH", "VM", "VV"),
    "numeral": ("CRD",),
    "preposition": ("PRP", "PRF"),
}
_PART_OF_TAG = {tag: part for part, tags in PARTS.items() for tag in tags}
_SENTENCE = re.compile(r"(?<=[.!?])[\"”')\]]*\s+")
# As the tagger's corpus was split: clitics by themselves, punctuation by itself.
_WORD = re.compile(
    r"[^\W\d_]+(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|[^\W_]+(?:[-.,][^\W_]+)*|[^\w\s]", re.IGNORECASE
)
_NO_WORDS = ("PU", "POS")
_INTERVAL = 1.96  # standard errors of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Composition:
    """Shares of parts of speech.

    Attributes:
      shares: of all words, by part; "other" is the rest (determiners, pronouns, conjunctions, ...).
      half_widths: of 95 % intervals, from the spread between captions.
      words: how many were tagged; punctuation and possessive endings are none.
      captions: how many they are from.
    """

    shares: dict[str, float]
    half_widths: dict[str, float]
    words: int
    captions: int


def composition(texts: Sequence[str]) -> Composition | None:
    """The lexical composition of captions; None without the extra `report`."""
    tagger = _tagger()
    if tagger is None:
        return None
    counts = [collections.Counter(part for _, part in parts_of_speech(text)) for text in texts]
    totals = [count.total() for count in counts]
    words = sum(totals)
    shares, half_widths = {}, {}
    for part in (*PARTS, "other"):
        share = sum(count[part] for count in counts) / max(1, words)
        # A ratio of sums over captions; words of one caption are not independent.
        spread = sum((count[part] - share * total) ** 2 for count, total in zip(counts, totals, strict=True))
        shares[part], half_widths[part] = share, _INTERVAL * math.sqrt(spread) / max(1, words)
    return Composition(shares, half_widths, words, len(texts))


def parts_of_speech(text: str) -> list[tuple[str, str]]:
    """(word, part of speech) of every word of a text.

    Raises:
      ImportError: the extra `report` is not installed.
    """
    tagger = _tagger()
    if tagger is None:
        raise ImportError(f"parts of speech need HanTa: {HOW_TO_GET}")
    found = []
    for sentence in _SENTENCE.split(text):
        words = [word.replace("’", "'") for word in _WORD.findall(sentence)]
        for word, tag in zip(words, tagger.tag_sent(words, taglevel=0), strict=True):
            if not tag.startswith(_NO_WORDS):
                found.append((word, _part(tag)))
    return found


def distinct(texts: Iterable[str], n: int, words: int | None = None) -> tuple[float, int]:
    """(different n-grams as a share of all, how many n-grams there are); none crosses captions.

    The share falls with the amount of text, so that only equal amounts can be compared: of longer
    samples the first `words` tokens count.
    """
    seen: set[tuple[str, ...]] = set()
    total, left = 0, words
    for text in texts:
        tokens = tokenize(text)[:left]
        left = None if left is None else left - len(tokens)
        grams = list(zip(*(itertools.islice(tokens, i, None) for i in range(n)), strict=False))
        total += len(grams)
        seen.update(grams)
    return len(seen) / max(1, total), total


def count_tokens(texts: Iterable[str]) -> int:
    """Tokens in all."""
    return sum(len(tokenize(text)) for text in texts)


def openings(texts: Sequence[str], words: int = 3, most: int = 6) -> list[tuple[str, float]]:
    """The most frequent first words of captions, with the share of captions that begin so."""
    counts = collections.Counter(" ".join(tokenize(text[:200])[:words]) for text in texts)
    return [(opening, count / len(texts)) for opening, count in counts.most_common(most)]


def _part(tag: str) -> str:
    return _PART_OF_TAG.get(tag, _PART_OF_TAG.get(tag[:2], "other"))


@functools.cache
def _tagger() -> Any:
    try:
        from HanTa import HanoverTagger
    except ImportError:
        return None
    return HanoverTagger.HanoverTagger("morphmodel_en.pgz")
