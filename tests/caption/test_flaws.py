"""Loops are those of the rule as it is said, for tokens and for words."""

import random

import pytest

from sg4v_jax.caption.corpus.guards import flags_of
from sg4v_jax.caption.flaws import ends_whole, repeats
from sg4v_jax.caption.report.captions import Caption
from sg4v_jax.caption.report.measure import COLUMNS, numbers
from sg4v_jax.infer.request import Completion


def naive_loops(tokens: list[int]) -> bool:
    """The rule as it is said: a unit of at most 96 tokens, four times in a row, twelve tokens at least."""
    for start in range(len(tokens)):
        for period in range(1, 97):
            times = max(4, -(-12 // period))
            unit = tokens[start : start + period]
            needed = max(4 * period, 12)
            if len(tokens) - start >= needed and tokens[start : start + needed] == (unit * times)[:needed]:
                return True
    return False


def test_loops_equal_the_rule() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(400):
        tokens = rng.choices(range(rng.choice([2, 9])), k=rng.randrange(40))
        if rng.random() < 0.5:
            unit = rng.choices(range(9), k=rng.randrange(1, 12))
            at = rng.randrange(len(tokens) + 1)
            tokens[at:at] = (unit * 6)[: rng.randrange(60)]
        expected = naive_loops(tokens)
        seen.add(expected)
        assert repeats("", tokens) == repeats("", [f"w{token}" for token in tokens]) == expected, tokens
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("text", "repetition"),
    [
        ("A cat sits on a red mat.", False),
        ("no " * 11 + "end.", False),
        ("no " * 12 + "end.", True),
        ("It is a red car. There is a tree. It is a red car.", False),
        ("It is a red car. There is a tree. It is a red car. Look! It is a red car.", True),
    ],
)
def test_guards_and_reports_say_the_same(text: str, repetition: bool) -> None:
    words = text.split()
    flags = flags_of(Completion(text, tuple(map(hash, words)), True, -1.0, "end"))
    assert ("repetition" in flags) == repetition
    names = COLUMNS.names
    assert names is not None
    columns = names[names.index("characters") :]
    row = dict(zip(columns, numbers(Caption("a.jpg", text)), strict=True))
    assert row["repetition"] == repetition and ends_whole(text)
