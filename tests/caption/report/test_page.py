"""The page and the command: what is written of captions stays text, whatever is in them."""

import base64
import hashlib
import html.parser
import json
import pathlib
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sg4v_jax.__main__ import main
from sg4v_jax.caption.report.captions import Caption
from sg4v_jax.caption.report.measure import measure
from sg4v_jax.caption.report.page import marked, picture, render
from sg4v_jax.caption.report.report import Options, make_report
from sg4v_jax.page.html import document, table
from tests.caption.report.conftest import llava, write_json, write_lines

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> & \"'><b>bold</b> \x1b[31m"
Sets = tuple[pathlib.Path, pathlib.Path]


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"])) | st.text("<>&\"'/ aseem0123456789text-!", max_size=80)
)
def test_a_caption_shows_as_it_is(text: str) -> None:
    text = text.strip()
    page = Page(marked(Caption("a.jpg", text)))
    assert set(page.tags) <= {"p", "mark", "small"}
    # A parser of HTML takes every kind of line end as one.
    assert page.text.startswith(re.sub("\r\n?", "\n", text)) or page.text.startswith(text)


def test_nothing_from_the_data_becomes_markup(tmp_path: pathlib.Path) -> None:
    name = EVIL.replace("/", "")
    (tmp_path / "<i>").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / f"<i>/{name}.png")
    images = [f"<i>/{name}.png", f"{name}/gone.png", "../outside.png", "/etc/passwd"]
    records = [llava(image, f"{EVIL} It seems odd {i}") for i, image in enumerate(images)]
    file = write_json(tmp_path / "<b>.json", [*records, {"id": EVIL}])
    other = write_json(tmp_path / "b.json", records[::-1])
    report = make_report([measure([file], EVIL), measure([other])], tmp_path)
    page = Page(render(report))
    assert not {"script", "i", "b", "iframe", "link"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("<script>alert(1)</script>") > 8
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == page.tags.count("img") > 0
    assert all(value and value.startswith("data:image/jpeg;base64,") for value in sources)
    assert "leave" not in page.text and "is absolute" in page.text and "holds '..'" in page.text


def test_pictures_are_drawn_anew_and_small(tmp_path: pathlib.Path) -> None:
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "a.png", comment="secret")
    shown = re.search('base64,([^"]+)', picture(tmp_path, "a.png", 100))
    assert shown
    data = base64.b64decode(shown[1])
    assert data.startswith(b"\xff\xd8") and len(data) < 4000 and b"secret" not in data
    (tmp_path / "b.png").write_bytes(b"no image")
    assert "can&#x27;t be decoded" in picture(tmp_path, "b.png")
    assert "No such file" in picture(tmp_path, "c.png")


def test_only_the_given_script_may_run() -> None:
    text = document("x", "", script="let a = 1 < 2;")
    digest = base64.b64encode(hashlib.sha256(b"let a = 1 < 2;").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and text.count("<script>") == 1
    assert "script-src 'none'" in document("x", "")


def test_tables_align_numbers() -> None:
    page = table([["a", "b", "c"], ["x", "1,000", "y"], ["z", "-2", "3"]])
    assert page.count("<td class=n>") == 2 and page.count("<th class=n>") == 1


def test_the_page_has_every_part(two_sets: Sets, image_root: pathlib.Path) -> None:
    sets = [measure([file], name) for file, name in zip(two_sets, "AB", strict=True)]
    page = Page(render(make_report(sets, image_root, Options(each=2))))
    titles = ["Samples", "Image by image", "Length", "Beside the paper's numbers", "Lexical composition"]
    titles += ["Diversity", "Phrases at risk", "Flags", "By source: A", "By source: B", "What was read"]
    assert all(title in page.text for title in titles)
    assert "942" in page.text and "38.2%" in page.text  # The paper's.
    assert page.tags.count("svg") == 2 and page.tags.count("mark") > 6
    alone = Page(render(make_report(sets[:1], image_root)))
    assert "Image by image" not in alone.text and alone.tags.count("article") >= 6


# --- The command ---------------------------------------------------------------------------------


def test_the_command(
    two_sets: Sets, image_root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, short = map(str, two_sets)
    page, votes = tmp_path / "out/report.html", tmp_path / "out/votes.json"
    common = [dense, "--compare", short, "--names", "dense", "short", "--images", str(image_root)]
    main(["report", *common, "--output", str(page), "--preference", str(tmp_path / "out/vote.html")])
    printed = capsys.readouterr().out
    assert re.search(r"captions +12 +10\n", printed) and "with 10 pairs" in printed
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["sets"][0]["phrases"]["hedge"] == {"captions": 12, "occurrences": 12}
    assert found["sets"][1]["name"] == "short" and found["votes"] is None
    key = json.loads((tmp_path / "out/vote.key.json").read_text())
    cast = {i: "left" if left == 0 else "right" for i, left in enumerate(key["left"])}
    write_json(votes, {"page": key["page"], "rater": "me", "votes": cast})
    main(["report", "--votes", str(votes)])
    assert re.search(r"dense +100\.0%", capsys.readouterr().out)
    main(["report", *common, "--output", str(page), "--votes", str(votes)])
    assert json.loads(page.with_suffix(".json").read_text())["votes"]["first"]["share"] == 1
    assert "this vote: dense or short" in page.read_text()


@pytest.mark.parametrize("arguments, message", [
    ([], "give caption files and --images"),
    (["x.json", "--images", "."], "nothing to write"),
    (["x.json", "--images", ".", "--preference", "p.html"], "needs two sets"),
    (["x.json", "--images", ".", "--output", "r.html", "--names", "a", "b"], "2 names for 1 set"),
    (["x.json", "--images", "no-folder", "--output", "r.html"], "no such image folder"),
    (["x.json", "--images", ".", "--output", "r.html"], "x.json: no such file"),
    (["x.json", "--images", ".", "--output", "r.html", "--sample", "0"], "must be at least 1"),
])  # fmt: skip
def test_what_is_missing_is_said(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", *arguments])
    assert message in capsys.readouterr().err


def test_it_needs_no_jax(two_sets: Sets, image_root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A report of a million captions is made on any machine, and without a second's delay."""
    lines = [{"image": "coco/1.png", "caption": "I'm sorry.", "finished": False}]
    file = write_lines(tmp_path / "a.jsonl", lines)
    code = (
        "import sys; from sg4v_jax.__main__ import main; "
        f"main(['report', {str(file)!r}, '--images', {str(image_root)!r}, '--output', 'r.html']); "
        "assert not {'jax', 'flax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "r.json").read_text())["sets"][0]["flags"]["cut off"] == 1
