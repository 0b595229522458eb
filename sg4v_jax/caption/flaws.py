"""What can be wrong with how a caption was written: loops, and ends in mid-sentence.

One rule for the guards of `sg4v caption`, which have a caption's tokens, and for `sg4v report`, which has
words only.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

# The longest unit of a loop, and what counts as one: the unit so many times in a row, and so many tokens
# (or words) of it. Fewer are "ha ha ha", or three rows of a table.
LONGEST_UNIT, TIMES, LEAST = 96, 4, 12
# A sentence of this many words said this many times is a loop with something in between.
SENTENCE_WORDS, SENTENCE_TIMES = 4, 3
_SENTENCE = re.compile(r"[^.!?。！？]+")
_WHOLE_SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)\]*]*$")
# Of a loop of 12 with a unit of 3, ten trigrams are three different ones; of any other one more are again.
_REPEATED_TRIGRAMS = 7


def repeats(text: str, units: Sequence[Hashable]) -> bool:
    """Whether a caption is a loop: of its tokens or words, or of a sentence that is said again and again.

    Args:
      text: the caption.
      units: its tokens, or its words.
    """
    return _loops(units) or _repeats_a_sentence(text)


def ends_whole(text: str) -> bool:
    """Whether a text ends with the end of a sentence, quotes and brackets after it included."""
    return bool(_WHOLE_SENTENCE.search(text))


def _loops(units: Sequence[Hashable]) -> bool:
    """Whether some run of units comes `TIMES` in a row at least, anywhere."""
    trigrams = list(zip(units, units[1:], units[2:], strict=False))
    if len(trigrams) - len(set(trigrams)) < _REPEATED_TRIGRAMS:
        return False
    numbers: dict[Hashable, int] = {}
    ids = np.array([numbers.setdefault(unit, len(numbers)) for unit in units])
    for period in range(1, min(LONGEST_UNIT, len(ids) // TIMES) + 1):
        # So many units in a row are what they were a period before.
        needed = max(period * (TIMES - 1), LEAST - period)
        same = ids[period:] == ids[:-period]
        if same.sum() >= needed:
            breaks = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
            if np.diff(breaks).max() > needed:
                return True
    return False


def _repeats_a_sentence(text: str) -> bool:
    sentences = (tuple(sentence.split()) for sentence in _SENTENCE.findall(text.lower()))
    counts = Counter(words for words in sentences if len(words) >= SENTENCE_WORDS)
    return any(count >= SENTENCE_TIMES for count in counts.values())
