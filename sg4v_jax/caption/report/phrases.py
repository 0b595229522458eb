"""Phrases that often go with things which are not in the image.

These are counts of phrases and no judgements: "appears to be a dog" may be right, and a caption with
none of them may be invented from end to end. They say where to look, and how two sets differ.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

# A token is a run of letters and digits; apostrophes and hyphens inside it belong to it.
TOKEN = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
MOST_SEEN = 5  # things that one counts at a glance

_TEENS = [
    *("ten", "eleven", "twelve", "thirteen", "fourteen"),
    *("fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
_UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = [*_UNITS[MOST_SEEN:], *_TEENS, *_TENS, *(f"{ten}-{unit}" for ten in _TENS for unit in _UNITS)]
_NUMBERS = [*_WORDS, *map(str, range(MOST_SEEN + 1, 1000))]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of phrases.

    Attributes:
      meaning: for people.
      phrases: in lower case; the longest that fits counts.
      pattern: others, with their case; None is no others.
      openers: tokens of which one must be there for the pattern to fit, to save looking; empty is any.
    """

    meaning: str
    phrases: tuple[str, ...]
    pattern: re.Pattern[str] | None = None
    openers: frozenset[str] = frozenset()


_HEDGES = (
    "appears to|appear to|appearing to|appears as|seems|seem|seemingly|apparently|possibly|perhaps|maybe|"
    "might|may be|may have|could be|likely|probably|presumably|suggests|suggest|suggesting|indicating|"
    "implying|hinting at|as if|as though"
)
_TEXTS = "reads|says|text|the word|the words|written|inscription|inscribed|lettering|labeled|labelled"
_MOODS = (
    "atmosphere|ambiance|ambience|mood|sense of|feeling of|evokes|evoking|conveys|conveying|testament to|"
    "captures the essence|adds to the|adding to the|adds a touch"
)
_UNSEEN = (
    "no other|not visible|not shown|out of frame|out of view|outside the frame|beyond the frame|off camera|"
    "cannot be seen|can't be seen|can’t be seen|absence of|there are no|there is no|no visible"
)
_QUOTED = re.compile(r'"[^"\n]{1,80}"|“[^”\n]{1,80}”')
_TITLES = (
    "mr|mrs|ms|dr|prof|president|minister|senator|professor|king|queen|prince|princess|pope|actor|actress|"
    "singer|rapper|musician|player|politician|celebrity|athlete|director|character|named|known as|"
    "identified as|portrayed by|played by"
)
_NAMED = re.compile(rf"\b(?i:(?:mr|mrs|ms|dr|prof)\.|(?:{_TITLES}),?) [A-Z][\w'’\-]+")

KINDS: dict[str, Kind] = {
    "hedge": Kind("what is guessed: seems, appears to, possibly, suggesting, ...", tuple(_HEDGES.split("|"))),
    "writing": Kind("what is read in the image: reads, says, written, anything in quotation marks, ...",
                 tuple(_TEXTS.split("|")), _QUOTED),
    "count": Kind(f"exact numbers above {MOST_SEEN}, in words or up to three digits (years are not meant)",
                  tuple(_NUMBERS)),
    "person": Kind("people by name: a title, profession or 'named' before a capitalised word", (),
                   _NAMED, frozenset(title.split()[0] for title in _TITLES.split("|"))),
    "mood": Kind("what is felt: atmosphere, mood, a sense of, evokes, adds to the, ...",
                 tuple(_MOODS.split("|"))),
    "unseen": Kind("what is not in the image: there is no, not visible, out of frame, ...",
                   tuple(_UNSEEN.split("|"))),
}  # fmt: skip

_BY_FIRST: dict[str, list[tuple[tuple[str, ...], str]]] = {}
for _kind, _about in KINDS.items():
    for _phrase in _about.phrases:
        _tokens = tuple(_phrase.split())
        _BY_FIRST.setdefault(_tokens[0], []).append((_tokens, _kind))
for _candidates in _BY_FIRST.values():
    _candidates.sort(key=lambda candidate: -len(candidate[0]))


def tokenize(text: str) -> list[str]:
    """The tokens of a text, in lower case."""
    return TOKEN.findall(text.lower())


def count_phrases(text: str, tokens: Sequence[str]) -> list[int]:
    """How often each of `KINDS` occurs, in that order.

    Args:
      text: the caption.
      tokens: `tokenize(text)`.
    """
    counts = dict.fromkeys(KINDS, 0)
    for _, _, kind in _in_tokens(tokens):
        counts[kind] += 1
    for kind, about in KINDS.items():
        if about.pattern and not (about.openers and about.openers.isdisjoint(tokens)):
            counts[kind] += sum(1 for _ in about.pattern.finditer(text))
    return list(counts.values())


def find_phrases(text: str) -> list[tuple[int, int, str]]:
    """(first character, end, kind) of the phrases in a text, in order; of two that overlap the first."""
    words = list(TOKEN.finditer(text))
    found = [
        (words[first].start(), words[last].end(), kind)
        for first, last, kind in _in_tokens([word[0].lower() for word in words])
    ]
    for kind, about in KINDS.items():
        if about.pattern:
            found += [(match.start(), match.end(), kind) for match in about.pattern.finditer(text)]
    spans: list[tuple[int, int, str]] = []
    for span in sorted(found, key=lambda span: (span[0], -span[1])):
        if not spans or span[0] >= spans[-1][1]:
            spans.append(span)
    return spans


def _in_tokens(tokens: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(first token, last token, kind) of phrases that are made of tokens."""
    after = 0
    for index, token in enumerate(tokens):
        if token not in _BY_FIRST or index < after:
            continue
        for phrase, kind in _BY_FIRST[token]:
            if tuple(tokens[index : index + len(phrase)]) == phrase:
                after = index + len(phrase)
                yield index, after - 1, kind
                break
