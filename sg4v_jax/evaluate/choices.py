"""Which option a free answer to a multiple-choice question names."""

import re
from collections.abc import Mapping, Sequence

from sg4v_jax.evaluate.benchmark import LETTERS

NONE_OF_THEM = "Z"
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# The letter has to come among the last words: before, it may be an article.
_LAST_WORDS = 5
_VERBOSE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def lettered(options: Sequence[str]) -> str:
    """The options as lines `A. ...`, each after a line break."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def infer_option(answer: str, options: Mapping[str, str]) -> str:
    """The option that an answer names, by the rules of MMBench's tool; "" if they can't tell.

    First a single option letter among the words, then "the answer is X", then the text of exactly one
    option (VLMEvalKit's `can_infer`). Where the rules can't tell, the official tool asks a language model.

    Args:
      answer: what the model said.
      options: text by letter.

    Returns:
      A letter, `NONE_OF_THEM` for a refusal, or "".
    """
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str:
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS:
        return named[0]
    if not named and NONE_OF_THEM in words:
        return NONE_OF_THEM
    match = _VERBOSE.search(answer)
    return match[1].upper() if match and match[1].upper() in options else ""


def _by_text(answer: str, options: Mapping[str, str]) -> str:
    # An answer much longer than all options names them all, or talks about something else.
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""
