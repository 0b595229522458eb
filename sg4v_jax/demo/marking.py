"""Which words of a caption are right: the score's verdicts on facts, brought back to the text."""

import re
from typing import NamedTuple

from sg4v_jax.world import Fact, Scene, facts, parse

# No fact reaches across these borders; a word such as "red" then belongs to the one thing of its clause.
_CLAUSE = re.compile(r"(?<=[.,])\s+")
_WORD = re.compile(r"\w+")
_RELATION = re.compile(r"\bis\s+(.+)\s+the\b", re.IGNORECASE | re.DOTALL)


class Piece(NamedTuple):
    """A stretch of a caption.

    Attributes:
      text: the characters, spaces and punctuation included; all pieces joined are the caption.
      right: whether what it states is true; None if it states nothing.
    """

    text: str
    right: bool | None


def mark(caption: str, scene: Scene) -> list[Piece]:
    """Cuts a caption into pieces that are right, wrong or neutral.

    A fact counts as in `world.attribute_f1`: what is said of a place where nothing is, is wrong, and
    of relations, only those that a dense caption gives are right.

    Args:
      caption: any text.
      scene: what it should describe.
    """
    truth, pieces, start = facts(scene), [], 0
    for end in [*(border.start() for border in _CLAUSE.finditer(caption)), len(caption)]:
        pieces += _mark_clause(caption[start:end], truth)
        start = end
    return _joined(pieces)


def bracketed(caption: str, scene: Scene) -> str:
    """The caption with its wrong words in brackets, for a terminal."""
    return "".join(f"[{text}]" if right is False else text for text, right in mark(caption, scene))


def _mark_clause(clause: str, truth: frozenset[Fact]) -> list[Piece]:
    words = list(_WORD.finditer(clause))
    verdicts: dict[int, bool] = {}
    for fact in parse(clause):
        for index in _spelling(fact, clause, words):
            verdicts[index] = verdicts.get(index, True) and fact in truth
    pieces, start = [], 0
    for index, word in enumerate(words):
        pieces.append(Piece(clause[start : word.start()], None))
        pieces.append(Piece(word[0], verdicts.get(index)))
        start = word.end()
    return [*pieces, Piece(clause[start:], None)]


def _spelling(fact: Fact, clause: str, words: list[re.Match[str]]) -> list[int]:
    """Indices of the words that state a fact in its clause."""
    if fact.attribute == "relation":
        # The fact may be the converse of what is written, so its own words need not be there.
        phrase = _RELATION.search(clause)
        start, end = phrase.span(1) if phrase else (0, 0)
        return [index for index, word in enumerate(words) if start <= word.start() < end]
    spelled = fact.value.split()
    return [index for index, word in enumerate(words) if word[0].lower() in spelled]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Adjacent pieces of one verdict as one, with the spaces between them."""
    joined: list[Piece] = []
    for piece in filter(lambda piece: piece.text, pieces):
        bridges = len(joined) > 1 and joined[-1].right is None and joined[-1].text.isspace()
        if bridges and piece.right is not None and joined[-2].right == piece.right:
            space = joined.pop()
            joined[-1] = Piece(joined[-1].text + space.text + piece.text, piece.right)
        elif joined and joined[-1].right == piece.right:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.right)
        else:
            joined.append(piece)
    return joined
