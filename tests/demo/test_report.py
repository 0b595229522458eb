import html.parser
import json
import math
import pathlib
import re

import pytest

from sg4v_jax.demo.marking import Piece, bracketed, mark
from sg4v_jax.demo.report import numbers, summary, write_report
from sg4v_jax.demo.report_html import page
from sg4v_jax.page import svg
from sg4v_jax.world import Scene, Thing, brief, dense, facts, parse, sample_scene
from tests.demo.fake_report import fake_report

SCENE = Scene(
    "teal",
    "plain",
    (Thing("square", "red", "large", "plain", 0, 0), Thing("bar", "red", "small", "striped", 1, 1)),
)
DENSE = dense(SCENE)


class Balance(html.parser.HTMLParser):
    """Collects what is wrong with the nesting of tags, and which tags there are."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")


def check(text: str) -> Balance:
    balance = Balance()
    balance.feed(text)
    balance.close()
    assert not balance.problems
    assert not balance.open
    return balance


def wrong(caption: str, scene: Scene = SCENE) -> list[str]:
    return [piece.text for piece in mark(caption, scene) if piece.right is False]


# --- Marking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_true_caption_has_no_wrong_words(seed):
    scene = sample_scene(seed)
    assert not wrong(brief(scene), scene) and not wrong(dense(scene), scene)
    marked = " ".join(piece.text for piece in mark(dense(scene), scene) if piece.right)
    for thing in scene.things:
        assert {thing.shape, thing.color, thing.size, thing.texture} <= set(marked.split())
        assert thing.position in marked
    assert scene.background in marked and scene.pattern in marked


@pytest.mark.parametrize("seed", range(40))
def test_every_false_fact_is_marked_and_no_text_is_lost(seed):
    caption, scene = dense(sample_scene(seed)), sample_scene(seed + 1)
    assert "".join(piece.text for piece in mark(caption, scene)) == caption
    marked = set(" ".join(wrong(caption, scene)).split())
    for fact in parse(caption) - facts(scene):
        if fact.attribute != "relation":
            assert set(fact.value.split()) <= marked


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (DENSE, []),
        (DENSE.replace("plain red square", "plain blue square"), ["blue"]),
        (DENSE.replace("large plain red square", "small striped red square"), ["small striped"]),
        (DENSE.replace("below and to the right of", "to the left of"), ["to the left of"]),
        (DENSE.replace("teal and plain", "teal and shaded"), ["shaded"]),
        (DENSE.replace("teal and plain", "navy and plain"), ["navy"]),
        # The converse says the same.
        ("The square is above and to the left of the bar.", []),
        ("AT the TOP\nLEFT is a\n\nsmall  plain red square", ["small"]),
        # Where nothing is, everything is wrong.
        ("At the bottom left is a large plain red square.", ["bottom left", "large plain red square"]),
        ("A red square on a gray background.", ["gray"]),
        ("", []),
        ("No grammar at all: <b>squares</b>!", []),
    ],
)
def test_marks_exactly_the_wrong_words(caption, expected):
    assert wrong(caption) == expected
    assert "".join(piece.text for piece in mark(caption, SCENE)) == caption


def test_neighbouring_words_are_one_piece():
    assert mark("At the top left is a large red square.", SCENE) == [
        Piece("At the ", None),
        Piece("top left", True),
        Piece(" is a ", None),
        Piece("large red square", True),
        Piece(".", None),
    ]


def test_brackets_for_the_terminal():
    caption = "At the top left is a small red square."
    assert bracketed(caption, SCENE) == "At the top left is a [small] red square."


# --- The page ------------------------------------------------------------------------------------


def test_page_is_well_formed_and_self_contained():
    text = page(fake_report())
    balance = check(text)
    assert {"svg", "table", "style", "details", "polyline"} <= balance.seen
    assert not {"script", "link", "iframe"} & balance.seen
    assert not re.search(r'(src|href)="(?!data:image/(png|jpeg);base64,)', text)
    assert "@import" not in text and "url(" not in text


def test_page_has_the_numbers():
    report = fake_report()
    text = page(report)
    for f1 in (*report.f1.values(), report.blind.report):
        assert f"{f1.f1:.3f}" in text
        for score in f1.per_attribute.values():
            assert f"{score.f1:.3f}" in text
    for category, share in report.accuracy.per_category.items():
        assert category in text and f"{share:.3f}" in text
    assert f"{report.majority:.1%}" in text and f"{report.accuracy.overall:.1%}" in text
    assert all(title.replace("'", "&#x27;") in text for title in report.times)
    assert text.count("<img ") == len(report.images) + len(report.photos)
    assert text.count("<svg ") == len(report.curves)


def test_page_marks_wrong_words_and_no_right_ones():
    report = fake_report()
    report.scenes[0] = SCENE
    report.captions["captioner"][0] = DENSE.replace("large plain red square", "large plain blue square")
    card = page(report).split("<article")[1]
    assert "<span class=right>large plain</span> <span class=wrong>blue</span>" in card
    assert card.count("class=wrong") == 1
    report.captions["captioner"][0] = DENSE
    assert "class=wrong" not in page(report).split("<article")[1]


def test_model_text_is_escaped():
    report = fake_report()
    attack = '<script>alert("1")</script>'
    report.captions["captioner"][0] = f"A red {attack} square."
    report.questions[0] |= {"answer": attack, "truth": attack + "!", "question": attack}
    report.photos[0] = (report.photos[0][0], attack)
    text = page(report)
    assert "<script" not in text and 'alert("' not in text
    assert text.count("&lt;script&gt;") == 5
    check(text)


def test_wrong_answers_show_the_truth():
    report = fake_report()
    report.questions = [
        {"image": "a", "question": "How many?", "answer": "Two.", "truth": "two"},
        {"image": "a", "question": "Where?", "answer": "", "truth": "top left"},
    ]
    card = page(report).split("<article")[1]
    assert card.count("✓") == card.count("✗") == 1
    assert "truth: top left" in card and "truth: two" not in card


def test_photographs_are_said_to_be_recited_only_if_they_are():
    text = page(fake_report())
    assert text.count("word for word") == 3 and text.count("not its training caption") == 1


def test_f1_columns_are_the_blind_baseline_and_the_captioning_stages():
    report = fake_report()
    assert list(report.f1_columns()) == ["blind", "captioner", "pretrain"]
    assert report.f1_columns()["blind"] is report.blind.report


def test_page_says_what_training_starts_from():
    text = " ".join(page(fake_report()).split())
    assert "The captioner starts from random weights" in text and "stand in for CLIP" in text


@pytest.mark.parametrize("first", [[{"step": 0, "loss": math.nan}], []])
def test_page_of_a_run_that_diverged_or_logged_nothing(first):
    report = fake_report(count=2)
    report.curves = {
        "captioner": first,
        "pretrain": [{"step": 9, "loss": 2.0}],
        "finetune": [{"step": i, "loss": 0.0} for i in range(30)],
    }
    report.photos, report.times, report.reload_equal = [], {}, False
    text = page(report)
    check(text)
    assert "differs" in text and "Photographs" not in text
    check(page(fake_report(count=2)))


def test_log_axis():
    assert svg.log_bounds([0.07, 6.1]) == (0.05, 10)
    assert svg.log_bounds([2.0, 2.0]) == (1, 4)
    assert svg.log_bounds([]) == (0.1, 1)
    assert svg.log_ticks(0.05, 10) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert svg.log_ticks(1e-5, 10) == pytest.approx([1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10])


# --- Files and terminal --------------------------------------------------------------------------


def test_write_report(tmp_path: pathlib.Path, capsys):
    report = fake_report()
    path = write_report(tmp_path / "new", report)
    printed = capsys.readouterr().out
    assert path == tmp_path / "new" / "report.html" and str(path) in printed
    assert path.read_text(encoding="utf-8") == page(report)
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert found == json.loads(json.dumps(numbers(report)))
    assert found["caption_f1"]["captioner"]["overall"]["f1"] == report.f1["captioner"].f1
    assert found["blind"][report.blind.winner]["overall"]["f1"] == report.blind.f1
    assert found["accuracy"]["overall"] == report.accuracy.overall
    assert found["curves"] == report.curves and found["seconds"] == report.times


def test_terminal_summary_has_the_numbers():
    report = fake_report()
    text = summary(report)
    for f1 in (*report.f1.values(), report.blind.report):
        assert f"{f1.f1:.3f}" in text
    assert f"{report.accuracy.overall:.3f}" in text and f"{report.majority:.3f}" in text
    assert f"{sum(report.times.values()):.1f} s" in text
    assert all(title in text for title in report.times)
    assert "back the same: yes" in text
    report.reload_equal = False
    assert "back the same: NO" in summary(report)


def test_terminal_gets_no_control_characters_from_the_model():
    report = fake_report()
    report.captions["captioner"][0] = "A \x1b[31mred square.\x07"
    assert all(character.isprintable() for line in summary(report).splitlines() for character in line)
