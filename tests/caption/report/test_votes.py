"""The preference page, and its votes against scipy's intervals and tests."""

import html.parser
import json
import pathlib
import random
import re
from typing import Any

import pytest
import scipy.stats

from sg4v_jax.caption.report.measure import measure
from sg4v_jax.caption.report.preference import write_preference
from sg4v_jax.caption.report.votes import CHOICES, sign_test, summary, tally, wilson
from tests.caption.report.conftest import llava, write_json


class Ballot(html.parser.HTMLParser):
    """The form of a page: what a browser has of it.

    Attributes:
      page: the form's `data-page`.
      pairs: image and both captions of each, as they stand there.
      choices: (name, value, what is written on it) of every radio button.
      keys: of each button, those that press it.
      scripts: elements that could run.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.page, self.scripts = "", 0
        self.pairs: list[dict[str, str]] = []
        self.choices: list[tuple[str, str, str]] = []
        self.keys: list[tuple[str, list[str]]] = []
        self._into: str | None = None
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.scripts += tag == "script"
        if tag == "form":
            self.page = found["data-page"]
        elif tag == "fieldset":
            self.pairs.append({})
        elif tag == "img":
            self.pairs[-1]["image"] = found["src"]
        elif tag == "p" and self.pairs and "end" not in self.pairs[-1]:
            self._into = "right" if "left" in self.pairs[-1] else "left"
            self.pairs[-1][self._into] = ""
        elif tag == "input" and found.get("type") == "radio":
            self.choices.append((found["name"], found["value"], ""))
            self.keys.append((found["value"], found["data-keys"].split()))
            self._into = "choice"
        elif found.get("id") == "end":
            self.pairs[-1]["end"] = ""

    def handle_endtag(self, tag: str) -> None:
        self._into = None if tag in ("p", "label") else self._into

    def handle_data(self, data: str) -> None:
        if self._into == "choice":
            name, value, text = self.choices[-1]
            self.choices[-1] = (name, value, text + data)
        elif self._into:
            self.pairs[-1][self._into] += data


@pytest.fixture(scope="module")
def sets(two_sets: tuple[pathlib.Path, pathlib.Path]) -> list[Any]:
    return [
        measure([file], name) for file, name in zip(two_sets, ("the-dense-one", "the-short-one"), strict=True)
    ]


def test_the_page_is_blind_and_its_key_is_not(
    sets: list[Any], image_root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    written = write_preference(*sets, image_root, tmp_path / "p.html", pairs=8, seed=1)
    text, key = written.page.read_text(), json.loads(written.key.read_text())
    assert written.key.name == "p.key.json" and written.pairs == 8
    secrets = ("the-dense-one", "the-short-one", "dense.json", "short.jsonl", "coco/", "sam/")
    assert not any(secret in re.sub('base64,[^"]+', "", text) for secret in secrets)
    found = Ballot(written.page)
    assert found.page == key["page"] and key["names"] == ["the-dense-one", "the-short-one"]
    assert key["left"].count(0) == key["left"].count(1) == 4
    for pair, first, image in zip(found.pairs, key["left"], key["images"], strict=True):
        dense, short = (pair["right"], pair["left"]) if first else (pair["left"], pair["right"])
        assert dense.startswith("In the image") and short == f"A woman on a beach. {image.replace('/', ' ')}"
        assert pair["image"].startswith("data:image/jpeg;base64,")


def test_the_same_page_comes_out_again(
    sets: list[Any], image_root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pages = [write_preference(*sets, image_root, tmp_path / f"{i}.html", seed=i // 2) for i in range(3)]
    assert pages[0].page.read_bytes() == pages[1].page.read_bytes() != pages[2].page.read_bytes()
    assert pages[0].pairs == 10


def test_hostile_captions_stay_data(image_root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    evil = "</script><script>alert(1)</script><!-- <script> ]]> \u2028 & \"'"
    files = [write_json(tmp_path / f"{i}.json", [llava("coco/1.png", evil + str(i))]) for i in range(2)]
    written = write_preference(*map(lambda f: measure([f]), files), image_root, tmp_path / "p.html")
    found = Ballot(written.page)
    (pair,) = found.pairs
    assert found.scripts == 1 and {pair["left"], pair["right"]} == {evil + "0", evil + "1"}


def test_what_is_checked_is_what_is_counted(
    sets: list[Any], image_root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The page's file is the form as the browser has it: names and values of what is checked."""
    written = write_preference(*sets, image_root, tmp_path / "p.html", pairs=3)
    form, key = Ballot(written.page), json.loads(written.key.read_text())
    assert [name for name, _, _ in form.choices] == [str(i) for i in range(3) for _ in CHOICES]
    meant = {"Left is better←": "left", "Comparable↓": "tie", "Right is better→": "right"}
    assert {text: value for _, value, text in form.choices} == meant and set(meant.values()) == set(CHOICES)
    keys = {key: value for value, pressed in form.keys for key in pressed}
    assert (keys["ArrowLeft"], keys["ArrowDown"], keys["ArrowRight"]) == ("left", "tie", "right")
    assert len(keys) == sum(len(pressed) for _, pressed in form.keys[:3])
    votes = {
        name: value
        for name, value, _ in form.choices
        if value == ("left" if form.pairs[int(name)]["left"].startswith("In the image") else "right")
    }
    ballot = {"page": form.page, "rater": "ann", "votes": votes}
    result = tally([write_json(tmp_path / "v.json", ballot)], written.key)
    assert result.names == tuple(key["names"]) and result.first.share == 1.0 and result.pairs == 3


def test_equal_captions_are_no_pairs(image_root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    records = [llava("coco/1.png", "One."), llava("coco/2.png", "Two.")]
    first = measure([write_json(tmp_path / "a.json", records)])
    records[1] = llava("coco/2.png", "Zwei.")
    second = measure([write_json(tmp_path / "b.json", records)])
    written = write_preference(first, second, image_root, tmp_path / "p.html")
    assert (written.pairs, written.equal) == (1, 1)
    with pytest.raises(ValueError, match="no image with two different captions"):
        write_preference(first, first, image_root, tmp_path / "q.html")


# --- Votes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, total", [(0, 7), (1, 7), (38, 100), (265, 1000), (12, 12)])
def test_intervals_and_the_sign_test_are_scipys(count: int, total: int) -> None:
    expected = scipy.stats.binomtest(count, total)
    interval = expected.proportion_ci(method="wilson")
    found = wilson(count / total, total)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert sign_test(count, total - count) == pytest.approx(expected.pvalue)


def write_votes(folder: pathlib.Path, rater: str, votes: dict[int, str], page: str = "p1") -> pathlib.Path:
    return write_json(folder / f"votes-{rater}.json", {"page": page, "rater": rater, "votes": votes})


@pytest.fixture
def key(tmp_path: pathlib.Path) -> pathlib.Path:
    left = [random.Random(i).randrange(2) for i in range(50)]
    return write_json(tmp_path / "p.key.json", {"page": "p1", "names": ["A", "B"], "left": left})


def test_votes_go_to_whom_they_were_meant_for(key: pathlib.Path, tmp_path: pathlib.Path) -> None:
    left = json.loads(key.read_text())["left"]
    # Ann takes A in 20 pairs, B in 10, ties in 5; Bob is asked the first 10 again and always takes left.
    meant = [0] * 20 + [1] * 10 + [None] * 5
    sides = {0: {0: "left", 1: "right", None: "tie"}, 1: {1: "left", 0: "right", None: "tie"}}
    ann = {i: sides[left[i]][winner] for i, winner in enumerate(meant)}
    alone = tally([write_votes(tmp_path, "ann", ann)])
    assert (alone.votes, alone.pairs, alone.of_pairs, alone.agreement) == (35, 35, 50, None)
    assert (alone.first.share, alone.second.share, alone.tie.share) == (20 / 35, 10 / 35, 5 / 35)
    assert alone.first == wilson(20 / 35, 35)
    assert alone.p_value == pytest.approx(scipy.stats.binomtest(20, 30).pvalue)
    assert "A            57.1%" in summary(alone)
    bob = dict.fromkeys(range(10), "left")
    both = tally([write_votes(tmp_path, "ann", ann), write_votes(tmp_path, "bob", bob)], key)
    agreeing = left[:10].count(0)
    assert both.votes == 45 and both.pairs == 35 and both.raters == {"ann": 35, "bob": 10}
    assert both.agreement == agreeing / 10 and both.first.share == (20 + agreeing) / 45
    # More raters of the same pairs don't narrow the interval.
    assert both.first == wilson(both.first.share, 35)


@pytest.mark.parametrize("change, message", [
    ({"page": "p2"}, "votes of page 'p2', but .* is of 'p1'"),
    ({"votes": {"50": "left"}}, "expected a pair below 50"),
    ({"votes": {"1": "A"}}, "one of left, right, tie"),
    ({"votes": {}}, "no votes"),
    ({"votes": []}, "not an object"),
    (None, "expected a JSON object with page, rater, votes"),
])  # fmt: skip
def test_bad_votes(key: pathlib.Path, tmp_path: pathlib.Path, change: Any, message: str) -> None:
    ballot = {"page": "p1", "rater": "x", "votes": {"1": "tie"}}
    file = write_json(tmp_path / "v.json", {**ballot, **change} if change is not None else [1])
    with pytest.raises(ValueError, match=message):
        tally([file], key)


def test_a_rater_votes_once_and_the_key_must_be_clear(key: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = write_votes(tmp_path, "ann", {0: "tie"})
    with pytest.raises(ValueError, match="second file by rater 'ann'"):
        tally([file, file], key)
    write_json(tmp_path / "q.key.json", {})
    with pytest.raises(ValueError, match=r"Give --key; beside it there is p\.key\.json, q\.key\.json"):
        tally([file])
