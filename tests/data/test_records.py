"""The record schema and image paths."""

import json
import os
import pathlib
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from sg4v_jax.data.records import (
    Record,
    RecordError,
    Turn,
    parse_record,
    resolve_image,
    to_json,
)


def conversation(*texts: str) -> list[dict[str, str]]:
    sides = ("human", "gpt")
    return [{"from": sides[i % 2], "value": text} for i, text in enumerate(texts)]


def parse(**keys: Any) -> Record:
    return parse_record(keys, source="data.json", index=7)


def questions(record: Record) -> list[str]:
    return [turn.text for turn in record.turns if turn.role == "human"]


def test_image_record() -> None:
    record = parse(id="9", image="coco/9.jpg", conversations=conversation("<image>\nq", "a"))
    assert record == Record("9", ("coco/9.jpg",), (Turn("human", "<image>\nq"), Turn("gpt", "a")))


def test_text_record_ignores_other_keys_and_image_text() -> None:
    record = parse(id="x", model="", extra=[1], conversations=conversation("<image> tag?", "a"))
    assert record == Record("x", (), (Turn("human", "<image> tag?"), Turn("gpt", "a")))


def test_ids() -> None:
    turns = conversation("q", "a")
    assert parse(id=12, conversations=turns).id == "12"
    assert parse(conversations=turns).id == "7"


def test_leading_answer_is_skipped() -> None:
    turns = [{"from": "gpt", "value": ""}, *conversation("q", "a")]
    assert parse(conversations=turns).turns == (Turn("human", "q"), Turn("gpt", "a"))


@pytest.mark.parametrize(
    ("image", "texts", "expected"),
    [
        ("a", ["q", "a"], ["<image>\nq"]),
        (["a", "b"], ["q", "a", "r", "a"], ["<image>\n<image>\nq", "r"]),
        (["a", "b"], ["<image> q", "a", "<image> r", "a"], ["<image> q", "<image> r"]),
        (["a", "b"], ["<image> <image> q", "a"], ["<image> <image> q"]),
        ("a", ["<image> q <image>", "a"], ["<image> q "]),
        ("a", ["q", "a", "r <image>", "a"], ["q", "r <image>"]),
        ("a", ["", "a"], ["<image>\n"]),
        ("a", ["<image>", "an <image> tag"], ["<image>"]),
        ("a", ["q", "an <image> tag"], ["<image>\nq"]),
    ],
)
def test_placeholders_fit_images(image: Any, texts: list[str], expected: list[str]) -> None:
    record = parse(id="1", image=image, conversations=conversation(*texts))
    assert questions(record) == expected
    assert sum(q.count("<image>") for q in questions(record)) == len(record.images)


GOOD = conversation("q", "a")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id": None}, "'id' is NoneType None; make it a string"),
        ({"image": None}, "'image' is NoneType None; give a path or a list of paths"),
        ({"image": ""}, "'image' is str ''"),
        ({"image": []}, r"'image' is list \[\]"),
        ({"image": ["a", 3]}, r"'image' is list \['a', 3\]"),
        ({"conversations": None}, "'conversations' is missing"),
        ({"conversations": {}}, r"'conversations' is dict \{\}; give a list"),
        ({"conversations": []}, "has 0 usable turns and must end with an answer"),
        ({"conversations": conversation("q")}, "has 1 usable turns"),
        ({"conversations": conversation("q", "a", "r")}, "has 3 usable .*remove the last question"),
        ({"conversations": ["q", "a"]}, r"conversations\[0\]: expected an object"),
        ({"conversations": [{"from": "user", "value": "q"}]}, r"\[0\]: 'from' is str 'user'; use"),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, r"\[0\]: 'from' is list"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: 'value' is NoneType"),
        ({"conversations": GOOD[:1] * 2}, r"\[1\]: 'from' is 'human', expected 'gpt'; turns must"),
        ({"conversations": GOOD[1:] + GOOD[1:]}, r"\[1\]: 'from' is 'gpt', expected 'human'"),
        ({"conversations": conversation("q", " \n")}, r"conversations\[1\]: 'value' is empty"),
        ({"conversations": conversation(" ", "a")}, "question 0 is empty"),
        ({"conversations": conversation("q", "a\ud83d")}, "half of a surrogate pair at char.* 1"),
        ({"image": ["a", "b"], "conversations": conversation("<image>", "a")}, "names 2 .* hold 1"),
        (
            {"image": "a", "conversations": conversation("<image>", "a", "<image>", "a")},
            "names 1 .* hold 2",
        ),
    ],
)
def test_bad_records(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        parse_record({"id": "k", "conversations": GOOD} | keys, source="data.json", index=7)
    assert str(caught.value).startswith("data.json: record 7")
    assert "id" not in keys or "'id'" in str(caught.value)
    assert "id" in keys or "(id 'k')" in str(caught.value)


def test_record_that_is_no_object() -> None:
    with pytest.raises(RecordError, match=r"data.json: record 7: expected a JSON object.*list \["):
        parse_record([1], source="data.json", index=7)


words = st.text(st.characters(codec="utf-8"), max_size=20).map(lambda s: s.replace("<image>", ""))
filled = words.filter(lambda s: bool(s.strip()))


@hypothesis.given(
    st.text(st.characters(codec="utf-8")),
    st.lists(filled, max_size=3),
    st.lists(filled, min_size=1),
)
def test_to_json_inverts_parse(id_: str, images: list[str], texts: list[str]) -> None:
    texts = texts * 2
    texts[0] = "<image>" * len(images) + texts[0]
    turns = tuple(Turn("gpt", text) if i % 2 else Turn("human", text) for i, text in enumerate(texts))
    record = Record(id_, tuple(images), turns)
    obj = json.loads(json.dumps(to_json(record)))
    assert parse_record(obj, source="s", index=0) == record
    assert isinstance(obj.get("image", []), str if len(images) == 1 else list)


# Paths.


def test_resolve_image(tmp_path: pathlib.Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/link.jpg").symlink_to("9.jpg")
    assert resolve_image(tmp_path, "coco/9.jpg") == tmp_path.resolve() / "coco/9.jpg"
    assert resolve_image(str(tmp_path), "./a b ü.jpg") == tmp_path.resolve() / "a b ü.jpg"
    assert resolve_image(tmp_path, "coco/link.jpg") == tmp_path.resolve() / "coco/9.jpg"
    assert resolve_image(tmp_path, "a..b/..c.jpg").name == "..c.jpg"


def test_a_linked_root_is_fine(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to("real")
    assert resolve_image(tmp_path / "root", "x.jpg") == tmp_path.resolve() / "real/x.jpg"


@pytest.mark.parametrize(
    ("relative", "message"),
    [
        ("/etc/passwd", "is absolute"),
        ("//x/y", "is absolute"),
        ("\\x\\y", "is absolute"),
        ("C:\\x", "is absolute"),
        ("../x.jpg", r"holds '\.\.'"),
        ("a/../../x.jpg", r"holds '\.\.'"),
        ("a\\..\\..\\x.jpg", r"holds '\.\.'"),
        ("", "is empty"),
        ("a\0b", "holds a NUL"),
        ("out/x.jpg", "leads out of the image root.*symbolic link"),
        ("file.jpg", "leads out of the image root.*symbolic link"),
    ],
)
def test_paths_that_leave_the_root(tmp_path: pathlib.Path, relative: str, message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(tmp_path, root / "out")
    os.symlink(tmp_path / "secret.jpg", root / "file.jpg")
    with pytest.raises(RecordError, match=message):
        resolve_image(root, relative)


def test_a_sibling_with_the_same_beginning_is_outside(tmp_path: pathlib.Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "rootless").mkdir()
    (tmp_path / "root/x").symlink_to(tmp_path / "rootless")
    with pytest.raises(RecordError, match="leads out"):
        resolve_image(tmp_path / "root", "x/y.jpg")
