"""The record schema, streaming readers and image paths."""

import json
import os
import pathlib
import tracemalloc
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from sg4v_jax.data import records
from sg4v_jax.data.records import (
    Record,
    RecordError,
    Turn,
    parse_record,
    read_records,
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


# Reading.


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


OBJECTS = [
    {"id": "1", "conversations": conversation('a "quoted" \\ text\n', "😀日本 ]}")},
    {},
    {"n": [1, 2.5e3, -1, True, None, {"x": []}], "big": "x" * 300},
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_reads_arrays_and_lines_in_any_chunks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, chunk: int, bom: str
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    lines = "\n\n".join(map(json.dumps, OBJECTS))
    for text in (
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, ensure_ascii=False),
        "\n " + json.dumps(OBJECTS, indent=4) + "\n\n",
        json.dumps(OBJECTS, indent=1).replace("\n", "\r\n"),
        lines,
        lines + "\r\n",
    ):
        assert list(read_records(write(tmp_path / "f", bom + text))) == OBJECTS


@pytest.mark.parametrize("text", ["[]", " [ ]\n", "[\n]"])
def test_empty_array(tmp_path: pathlib.Path, text: str) -> None:
    assert list(read_records(write(tmp_path / "f", text))) == []


@hypothesis.given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(max_size=9),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=5,
            ),
            max_size=3,
        ),
        max_size=5,
    ),
    st.integers(1, 40),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_any_array_reads_as_json_load(
    tmp_path_factory: pytest.TempPathFactory, objects: Any, chunk: int, indent: Any, plain: bool
) -> None:
    objects = json.loads(json.dumps(objects))
    path = tmp_path_factory.getbasetemp() / "any.json"
    try:
        text = json.dumps(objects, indent=indent, ensure_ascii=plain).encode()
    except UnicodeEncodeError:
        text = json.dumps(objects, indent=indent).encode()
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", chunk)
        assert list(read_records(path)) == objects


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("", 0, "f: the file is empty"),
        ("  \n", 0, "f: the file is empty"),
        ('"x"', 0, "f: the file starts with '\"'; expected a JSON array"),
        ("[", 0, "record 0, line 1, character 1: expected a record.*found the end"),
        ('[{"a": 1}', 1, "record 1, .*expected ',' or ']' after a record, found the end"),
        ('[{"a": 1},\n', 1, "record 1, line 2.*expected a record.*cut off"),
        ('[{"a": 1},\n {"a": "xy', 1, "record 1, line 2, character 18: Unterminated .*is cut off"),
        ('[{"a": 1},\n]', 1, "record 1, line 2.*expected a record.*found ']'"),
        ("[1]", 0, "record 0, line 1.*expected a record.*found '1'"),
        ('[{"a": 1} {"b": 2}]', 1, "expected ',' or ']' after a record, found '{'"),
        ('[{"a": 1}] x', 1, "expected nothing after the array's ']', found 'x'"),
        ('[{"a": 1},\n\n{"b": tru}' + " " * 99, 1, r"record 1, line 3, character 18: Expecting va"),
        ('[{"a": 1},{a: 1}' + " " * 99, 1, "record 1, line 1, .*property name"),
        (
            '{"a": 1}\n{"b": \n',
            1,
            "record 1, line 2, column 6: Expecting value; a JSONL file holds",
        ),
        ('{"a": 1}\n\n[2]\n', 1, r"record 1, line 3: expected a JSON object, found list \[2\]"),
        ('{\n "a": 1\n}', 0, "line 1, .*one whole object on each line"),
        ('[{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]", 0, "record 0, line 1.*too deep"),
        ('{"a": ' + "9" * 5000 + "}", 0, "record 0, line 1.*number too long"),
    ],
)
def test_broken_files_say_where(tmp_path: pathlib.Path, text: str, count: int, message: str) -> None:
    seen: list[object] = []
    with pytest.raises(RecordError, match=f"(?s)f: .*{message.removeprefix('f: ')}"):
        seen.extend(read_records(write(tmp_path / "f", text)))
    assert len(seen) == count


def test_a_mistake_is_found_without_reading_to_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", 1 << 10)
    path = write(tmp_path / "f", '[{"a": 1, b: 2},' + '{"c": 3},' * 100_000 + "{}]")
    with open(path, encoding="utf-8") as file:
        with pytest.raises(RecordError, match=r"record 0, line 1, character 10: .*property name"):
            next(records._ArrayReader(file, "f").objects())
        assert file.tell() < 1 << 14


def test_an_endless_record_is_given_up(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK", 1 << 10)
    monkeypatch.setattr(records, "_LARGEST_RECORD", 1 << 12)
    path = write(tmp_path / "f", '[{"a": "' + "x" * 100_000 + '"}]')
    with pytest.raises(RecordError, match="Unterminated string"):
        list(read_records(path))


def test_files_that_are_no_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f.gz").write_bytes(b"\x1f\x8b\x08\x00abc")
    (tmp_path / "latin").write_bytes(b'[{"a": "caf\xe9"}]')
    for name in ("f.gz", "latin"):
        with pytest.raises(RecordError, match=r"not UTF-8 text.*Unpack it, or save it as UTF-8"):
            list(read_records(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "absent"))


@pytest.mark.parametrize("indent", [None, 1])
def test_memory_does_not_grow_with_the_file(tmp_path: pathlib.Path, indent: int | None) -> None:
    obj = {"id": "1", "conversations": conversation("q" * 50, "a" * 1000)}
    path = write(tmp_path / "f", json.dumps([obj] * 15_000, indent=indent))
    assert path.stat().st_size > 15e6
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 15_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


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
