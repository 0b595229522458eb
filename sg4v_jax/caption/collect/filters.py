"""Which answers are captions: each rule has a name, and the results count them by it."""

import dataclasses
import re

# Only the beginning counts: a caption may well say later that a sign "cannot be read".
_REFUSAL = re.compile(
    r"(i['’]?m|i am|we['’]?re|we are)?\s*(very |so |really )?sorry\b|"
    r"i apologi[sz]e|my apologies|unfortunately,? (i|we)\b|as an ai\b|"
    r"(i|we) (can['’]?t|can ?not|won['’]?t|am unable|are unable|am not able|do not|don['’]?t)\b|"
    r"(i['’]m|we['’]re) (unable|not able|not allowed)|"
    r"(this|your) request\b|no image (was|is|has been)\b",
    re.IGNORECASE,
)
_LIST_LINE = re.compile(r"^\s*([-*•–]\s+|\(?\d{1,3}[.)]\s+|\(?[a-z][.)]\s+|\|.*\|\s*$)")
_MARKUP_LINE = re.compile(r"^\s*(#{1,6}\s|```|\*\*[^*]+\*\*:?\s*$)|\*\*[^*\n]+\*\*:")
_WORD = re.compile(r"[^\W\d_]+")
# A third of English running text; of other languages' hardly any.
_ENGLISH = frozenset(
    re.findall(r"\w+", "the of and is with in to on are that from by an its as which at this it be has there")
)
_ENGLISH_SHARE = 0.15

FINISHED = ("stop", "eos", "end_turn", "")


@dataclasses.dataclass(frozen=True)
class Filters:
    """What a caption must be.

    Attributes:
      min_words: fewer are `short`.
      max_words: more are `long`.
      prose: lists and markup are `itemised`.
      language: "en" makes other languages `language`; "" takes any.
    """

    min_words: int = 20
    max_words: int = 600
    prose: bool = True
    language: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(f"min_words={self.min_words} and max_words={self.max_words} leave nothing")
        if self.language not in ("", "en"):
            raise ValueError(f"language {self.language!r}: only 'en' can be told from others")

    def verdict(self, text: str, finish_reason: str, refused: bool = False) -> str:
        """ "accepted", or the name of the first rule that the answer breaks.

        Args:
          text: the answer.
          finish_reason: why it ended, as the endpoint says; "" if it doesn't.
          refused: the endpoint itself marked it as a refusal.
        """
        words = text.split()
        rules = {
            "content_filter": finish_reason == "content_filter",
            "refusal": refused or bool(_REFUSAL.match(text.strip().lstrip("\"'*"))),
            "empty": not words,
            "truncated": finish_reason == "length",
            "unfinished": finish_reason not in FINISHED,
            "itemised": self.prose and _itemised(text),
            "language": self.language == "en" and not _english(text),
            "short": len(words) < self.min_words,
            "long": len(words) > self.max_words,
        }
        return next((name for name, broken in rules.items() if broken), "accepted")


def _itemised(text: str) -> bool:
    lines = text.splitlines()
    return sum(map(bool, map(_LIST_LINE.match, lines))) > 1 or any(map(_MARKUP_LINE.search, lines))


def _english(text: str) -> bool:
    words = _WORD.findall(text.lower())
    return sum(word in _ENGLISH for word in words) >= _ENGLISH_SHARE * len(words)
