"""Each rule on answers that break it, and on captions that only look as if they did."""

import pytest

from sg4v_jax.caption.collect.filters import Filters

GOOD = (
    "The image shows a street market in the rain. On the left, two women in yellow coats look at a stall "
    "with oranges, and behind them a man is pushing a bicycle. A sign above the stall cannot be read."
)
GERMAN = (
    "Das Bild zeigt einen Markt im Regen. Links betrachten zwei Frauen in gelben Mänteln einen Stand mit "
    "Orangen, und hinter ihnen schiebt ein Mann sein Fahrrad über die nasse Straße zum Bahnhof."
)


@pytest.mark.parametrize(
    ("text", "reason", "verdict"),
    [
        (GOOD, "stop", "accepted"),
        (GOOD, "", "accepted"),
        (GOOD + " - I'm sorry, says the sign.", "stop", "accepted"),
        (GOOD + "\n\n" + GOOD, "stop", "accepted"),
        ("1. " + GOOD, "stop", "accepted"),
        ("I'm sorry, I can't assist with that.", "stop", "refusal"),
        ("I’m sorry, but I can’t identify people. " + GOOD, "stop", "refusal"),
        ("Sorry, I cannot help.", "stop", "refusal"),
        ('"I cannot provide that."', "stop", "refusal"),
        ("Unfortunately, I am not able to see the image.", "stop", "refusal"),
        ("As an AI language model, I don't know.", "stop", "refusal"),
        ("I'm unable to view images.", "stop", "refusal"),
        ("I can see " + GOOD, "stop", "accepted"),
        ("", "stop", "empty"),
        (" \n ", "stop", "empty"),
        (GOOD, "length", "truncated"),
        ("", "content_filter", "content_filter"),
        (GOOD, "tool_calls", "unfinished"),
        (f"- {GOOD}\n- {GOOD}", "stop", "itemised"),
        (f"1. {GOOD}\n2) {GOOD}", "stop", "itemised"),
        (f"## Scene\n{GOOD}", "stop", "itemised"),
        (f"**Scene:** x\n{GOOD}", "stop", "accepted"),
        (f"**Scene**: x\n{GOOD}", "stop", "itemised"),
        ("A market.", "stop", "short"),
        (GOOD * 20, "stop", "long"),
    ],
)
def test_verdicts(text: str, reason: str, verdict: str) -> None:
    assert Filters().verdict(text, reason) == verdict


def test_what_can_be_chosen() -> None:
    assert Filters().verdict(GERMAN, "stop") == "accepted"
    assert Filters(language="en").verdict(GERMAN, "stop") == "language"
    assert Filters(language="en").verdict(GOOD, "stop") == "accepted"
    assert Filters(prose=False).verdict(f"- {GOOD}\n- {GOOD}", "stop") == "accepted"
    assert Filters(min_words=1).verdict("A market.", "stop") == "accepted"
    assert Filters().verdict(GOOD, "stop", refused=True) == "refusal"
    with pytest.raises(ValueError, match="min_words=5"):
        Filters(min_words=5, max_words=4)
    with pytest.raises(ValueError, match="'fr'"):
        Filters(language="fr")
