"""VQA accuracy and its two ways of making answers comparable, quirks included.

An answer counts min(1, matches / 3), averaged over leaving out each of the ten people in turn (Antol et
al. 2015). How texts are normalised is part of the definition; what looks odd here is odd in the official
tools too (spec 7.13 and 7.14), and scores would differ without it.
"""

import re
from collections.abc import Iterator, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# A full stop goes unless a digit follows. That one precedes it is not asked, and a flag passed as a count
# limits the official tool to 32 of them.
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
_ARTICLES = ("a", "an", "the")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS)}
_ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd "
    "how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't "
    "shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd "
    "something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've "
    "why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_MORE_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've "
    "you'd've"
)


def _contractions() -> Iterator[tuple[str, str]]:
    """(as people type it, as it is compared): an apostrophe is missing."""
    for word in _ONE_APOSTROPHE.split():
        yield word.replace("'", ""), word
    for word in _MORE_APOSTROPHES.split():
        for place in (match.start() for match in re.finditer("'", word)):
            yield word[:place] + word[place + 1 :], word
    yield "somebody'd", "somebodyd"  # The other way round in the official table.


_CONTRACTIONS = dict(_contractions())


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The score of an answer by the VQA challenge's tool, between 0 and 1.

    Texts are only normalised if the people disagree.

    Args:
      answer: what the model said.
      people: what people said, ten in the official files.
    """
    answer, people = _plain(answer), [_plain(text) for text in people]
    if len(set(people)) > 1:
        answer, people = _normalise(answer), [_normalise(text) for text in people]
    return _leave_one_out(answer, people)


def textvqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The score of an answer by TextVQA's tool, between 0 and 1; texts are always normalised."""
    return _leave_one_out(evalai_answer(answer), [evalai_answer(text) for text in people])


def evalai_answer(text: str) -> str:
    """An answer as the EvalAI servers take it (VQAv2, VizWiz), and as TextVQA compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalise(_plain(text))


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(answer: str, people: Sequence[str]) -> float:
    matches = sum(text == answer for text in people)
    others = [matches - (text == answer) for text in people]
    return sum(min(1.0, count / 3) for count in others) / len(people)


def _normalise(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark goes if it touches a space anywhere in the text, or a number has a comma; or becomes a space."""
    numbers = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        gone = numbers or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if gone else " ")
    return _FULL_STOP.sub("", cleaned, count=_MOST_FULL_STOPS)
