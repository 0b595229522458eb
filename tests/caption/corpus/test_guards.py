"""Loops and ends in mid-sentence are found, and ordinary captions are left alone."""

import pytest

from sg4v_jax.caption.corpus.guards import FLAGS, Guards, flags_of
from sg4v_jax.infer.options import SamplingOptions
from sg4v_jax.infer.request import Completion

CAPTION = (
    "In the center of the image, a vibrant blue lunch tray holds four containers, each with a variety of "
    "food items. The container on the top left holds broccoli. The one on the top right holds a roll. "
    "The tray stands on a table with a white cloth (and a fork)."
)


def completion(text: str, finished: bool = True) -> Completion:
    vocabulary: dict[str, int] = {}
    tokens = tuple(vocabulary.setdefault(word, len(vocabulary)) for word in text.split())
    return Completion(text, tokens, finished, -1.0, "end" if finished else "length")


@pytest.mark.parametrize(
    ("text", "finished", "flags"),
    [
        (CAPTION, True, ()),
        ('The sign says "STOP."', True, ()),
        ("桌子上有一只猫。", True, ()),
        ("", True, ("empty",)),
        (" \n", False, ("empty",)),
        (CAPTION, False, ("truncated",)),
        (CAPTION + " The", True, ("truncated",)),
        ("A cat " + "and a dog " * 20, False, ("repetition", "truncated")),
        ("very " * 12 + "large.", True, ("repetition",)),
        ("very very very large.", True, ()),
        (
            "It is a red car. There is a tree. It is a red car. Look at it! It is a red car.",
            True,
            ("repetition",),
        ),
        ("A cat. A cat. A cat.", True, ()),
    ],
)
def test_flags(text: str, finished: bool, flags: tuple[str, ...]) -> None:
    assert flags_of(completion(text, finished)) == flags
    assert set(flags) <= set(FLAGS)


def test_options_of_attempts() -> None:
    guards = Guards(retry=2, temperature=0.7, repetition_penalty=1.3, max_new_tokens=600)
    first = SamplingOptions(max_new_tokens=300, num_beams=3, seed=5)
    start = guards.options(first, "", 0, 10)
    assert start == SamplingOptions(max_new_tokens=300, num_beams=3, seed=15)
    again = guards.options(first, "repetition", 1, 10)
    assert (again.temperature, again.repetition_penalty, again.num_beams) == (0.7, 1.3, 1)
    assert again.max_new_tokens == 300
    assert guards.options(first, "truncated", 2, 10).max_new_tokens == 600
    seeds = {guards.options(first, "empty", n, i).seed for n in range(3) for i in range(50)}
    assert len(seeds) == 150 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("fields", [{"retry": -1}, {"temperature": -1.0}, {"repetition_penalty": 0.0}])
def test_what_is_out_of_range(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Guards(**fields)  # type: ignore[arg-type]
