"""What is shown is what is trained on: every token, image, boundary and mark."""

import html.parser
import re

import numpy as np
import pytest

from sg4v_jax.data.batch import Batch, from_rows
from sg4v_jax.data.records import Record, Turn
from sg4v_jax.data.sample import SampleFormat, make_sample
from sg4v_jax.data.show import segments, to_html, to_text
from sg4v_jax.data.tokenizer import Tokenizer
from tests.data.test_sample import image

FORM = SampleFormat(
    template="v1", aspect="pad", prompt="", image_size=24, image_tokens=4, length=700, image_slots=3
)
EVIL = "<script>alert(1)</script> \x1b[2J & \u202e done"


@pytest.fixture(scope="module")
def batch(small_tokenizer: Tokenizer) -> Batch:
    """A row with two images, none, and one; and a row with text that means harm."""

    def sample(images: int, question: str, answers: list[str]) -> dict[str, np.ndarray]:
        turns = []
        for i, answer in enumerate(answers):
            turns += [Turn("human", "<image>\n" * images * (i == 0) + question), Turn("gpt", answer)]
        record = Record("r", tuple("ab"[:images]), tuple(turns))
        return make_sample(record, [image()] * images, FORM, small_tokenizer)

    rows = [
        [
            sample(2, "What is in the picture?", ["Two dogs.", "A red ball."]),
            sample(0, "Who sits on the mat?", ["A cat sits."]),
            sample(1, "Where is the window?", ["In front of a window."]),
        ],
        [sample(1, EVIL, [EVIL])],
    ]
    return from_rows(rows, FORM.length, FORM.image_slots, FORM.image_size)


def test_spans_are_the_samples(batch: Batch, small_tokenizer: Tokenizer) -> None:
    found = segments(batch, 0, small_tokenizer, FORM.image_tokens)
    assert [[span.slot for span in s.spans if span.slot is not None] for s in found] == [[0, 1], [], [2]]
    marked = ["".join(span.text for span in s.spans if span.supervised) for s in found]
    assert [text.replace("</s>", "|").replace(" ", "") for text in marked] == [
        "Twodogs.|Aredball.|", "Acatsits.|", "Infrontofawindow.|",
    ]  # fmt: skip
    for sample, answers in zip(found, (2, 1, 1), strict=True):
        text = "".join(span.text for span in sample.spans)
        assert text.startswith("<s>A chat between a curious user")
        assert text.count("ASSISTANT:") == text.count("</s>") == answers
        inside = slice(sample.start, sample.end)
        assert len(set(batch.segment_ids[0, inside].tolist())) == 1
        assert sample.supervised == (batch.loss_weights[0, inside] > 0).sum()
    assert found[0].start == 0 and found[0].end == found[1].start and found[1].end == found[2].start


def test_terminal(batch: Batch, small_tokenizer: Tokenizer) -> None:
    shown = to_text(batch, small_tokenizer, FORM.image_tokens, rows=1, colour=False)
    used = int((batch.segment_ids[0] > 0).sum())
    assert f"row 0: {used} of 700 tokens ({used / 7:.1f} %), 3 of 3 images, 3 samples" in shown
    assert re.search(r"-- sample 1: positions 0 to \d+, slots 0, 1, \d+ supervised --", shown)
    assert re.search(r"-- sample 2: positions \d+ to \d+, no image, \d+ supervised --", shown)
    assert "« A cat sits.»" in shown or "«A cat sits.»" in shown
    assert "row 1" not in shown and "\x1b" not in shown
    coloured = to_text(batch, small_tokenizer, FORM.image_tokens, rows=9, colour=True)
    assert "row 1" in coloured and "\x1b[38;2;200;10;10m" in coloured
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", coloured)
    assert [text.strip() for text in green][:2] == ["Two dogs.", "</s>"]


def test_data_steers_no_terminal(batch: Batch, small_tokenizer: Tokenizer) -> None:
    for colour in (False, True):
        shown = to_text(batch, small_tokenizer, FORM.image_tokens, rows=2, colour=colour)
        assert "\x1b[2J" not in shown and "\u202e" not in shown
        assert "\\u001b[2J" in shown and "\\u202e" in shown


class Page(html.parser.HTMLParser):
    """Counts tags, and keeps marked text and links to elsewhere."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.marked: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["mark"]:
            self.marked.append(data)


def test_page_is_whole_and_harmless(batch: Batch, small_tokenizer: Tokenizer) -> None:
    page = Page(to_html(batch, small_tokenizer, FORM.image_tokens, "a <b> title"))
    assert page.tags.count("section") == 2 and page.tags.count("article") == 4
    assert page.tags.count("img") == 4 and "script" not in page.tags
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert any("alert(1)" in text for text in page.marked)
    assert "slot 1 empty" in to_html(batch, small_tokenizer, FORM.image_tokens, "t")
