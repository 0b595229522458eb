"""Streaming readers: what they give, where they say a mistake is, and how they go on after it."""

import gzip
import hashlib
import json
import pathlib
import re
import tracemalloc
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from sg4v_jax.data import json_stream
from sg4v_jax.data.json_stream import Position, read_entries, read_span, split_entries
from sg4v_jax.data.records import RecordError, read_records


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


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
    """And can start again at the position of any entry."""
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    lines = "\n\n".join(map(json.dumps, OBJECTS))
    for text in (
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, ensure_ascii=False),
        "\n " + json.dumps(OBJECTS, indent=4) + "\n\n",
        json.dumps(OBJECTS, indent=1).replace("\n", "\r\n"),
        lines,
        lines + "\r\n",
    ):
        path = write(tmp_path / "f", bom + text)
        assert list(read_records(path)) == OBJECTS
        entries = list(read_entries(path))
        for i, entry in enumerate(entries):
            assert list(read_entries(path, entry.position)) == entries[i:]
            rest = path.read_bytes()[entry.position.offset :].decode()
            assert json.JSONDecoder().raw_decode(rest)[0] == OBJECTS[i]
            before = path.read_bytes()[: entry.position.offset]
            assert (entry.position.index, entry.position.line) == (i, before.count(b"\n") + 1)


@pytest.mark.parametrize("text", ["[]", " [ ]\n", "[\n]"])
def test_empty_array(tmp_path: pathlib.Path, text: str) -> None:
    path = write(tmp_path / "f", text)
    assert list(read_records(path)) == []
    assert split_entries(path, 2).spans == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@hypothesis.given(
    st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3) | json_values, max_size=5),
    st.integers(1, 40),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_any_array_reads_as_json_load(
    tmp_path_factory: pytest.TempPathFactory, values: Any, chunk: int, indent: Any, plain: bool
) -> None:
    """Objects or not: what an entry should be is for `parse_record` to say."""
    values = json.loads(json.dumps(values))
    path = tmp_path_factory.getbasetemp() / "any.json"
    try:
        text = json.dumps(values, indent=indent, ensure_ascii=plain).encode()
    except UnicodeEncodeError:
        text = json.dumps(values, indent=indent).encode()
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert [entry.value for entry in read_entries(path)] == values


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("", 0, "f: the file is empty"),
        ("  \n", 0, "f: the file is empty"),
        ('"x"', 0, "f: the file starts with '\"'; expected a JSON array"),
        ("[", 0, "record 0, line 1, byte 1: Expecting value at byte 1; the file is cut off"),
        ('[{"a": 1}', 1, "record 1, line 1, byte 9: expected ',' or ']' after a record; the file is cut"),
        ('[{"a": 1},\n', 1, "record 1, line 2, byte 11: .*cut off"),
        ('[{"é": 1},\n {"a": "xy', 1, "record 1, line 2, byte 13: Unterminated .*byte 19; .*is cut off"),
        ('[{"a": 1},\n]', 1, "record 1, line 2, byte 11: Expecting value"),
        ("[1]", 0, "record 0, line 1, byte 1: expected a JSON object, found int 1"),
        ('[{"a": 1} {"b": 2}]', 1, "expected ',' or ']' after a record, found '{'"),
        ('[{"a": 1}] x', 1, "byte 11: expected nothing after the array's ']', found 'x'"),
        ('[{"a": 1},\n\n{"b": tru}' + " " * 99, 1, "record 1, line 3, byte 12: Expecting value at byte 18"),
        ('[{"a": 1},{a: 1}' + " " * 99, 1, "record 1, line 1, .*property name"),
        ('{"a": 1}\n{"b": \n', 1, "record 1, line 2, byte 9: column 6: Expecting value; a JSONL file holds"),
        ('{"a": 1}\n{"b": "x', 1, "record 1, line 2, byte 9, column 7: Unterminated .*cut off"),
        ('{"a": 1}\n\n[2]\n', 1, r"record 1, line 3, byte 10: expected a JSON object, found list \[2\]"),
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


GOOD = json.dumps({"id": "é", "conversations": conversation("q", "a, }, { b")}, ensure_ascii=False)
BROKEN = {
    "literal": '{"id": tru}',
    "key without quotes": '{id: "1"}',
    "missing comma": '{"id": "1" "image": "x"}',
    "missing quote": '{"id": "1, "conversations": []}',
    "quote not closed": '{"id": "1", "conversations": [{"from": "human", "value": "q}]}',
    "raw line break": '{"id": "1\n"}',
    "trailing comma inside": '{"id": "1",}',
    "no value": '{"id": }',
    "bracket missing": '{"id": "1", "conversations": [{"from": "human", "value": "q"}}',
    "bracket too many": '{"id": "1", "conversations": []]}',
    "brace missing": '{"id": "1", "conversations": []',
    "not utf-8": '{"id": "caf\udce9"}',
    "number too long": '{"id": ' + "9" * 5000 + "}",
    "nothing": "",
}


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", BROKEN)
def test_goes_on_after_a_broken_entry(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str, chunk: int
) -> None:
    """Only the broken entry is lost, it is named, and a reader that starts in the middle agrees."""
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    at = {"first": 0, "middle": 2, "last": 4}[place]
    entries = [GOOD] * 5
    entries[at] = BROKEN[name]
    text = "[" + ",\n".join(entries) + "]"
    (tmp_path / "f").write_bytes(text.encode("utf-8", "surrogateescape"))
    if place == "last" and name == "quote not closed":  # What a cut-off file looks like, too.
        with pytest.raises(RecordError, match="cut off"):
            list(read_entries(tmp_path / "f"))
        return
    found = list(read_entries(tmp_path / "f"))
    assert [entry.position.index for entry in found if entry.error] == [at]
    assert [entry.value for entry in found if not entry.error] == [json.loads(GOOD)] * 4
    error = found[at].error
    assert error and error.kind == "malformed_json"
    offset = len("[" + ",\n".join([*entries[:at], ""])) + at  # é takes two bytes
    assert str(error).startswith(f"{tmp_path / 'f'}: record {at}, line {at + 1}, byte {offset}: ")
    split = split_entries(tmp_path / "f", 2)
    assert split.entries == 5
    again = [entry for span in split.spans for entry in read_span(tmp_path / "f", span)]
    assert [repr(entry) for entry in again] == [repr(entry) for entry in found]


def test_goes_on_after_a_broken_line(tmp_path: pathlib.Path) -> None:
    text = f'{GOOD}\n{{"id": tru}}\n{GOOD}\nx\n"\udce9"\n{GOOD}'
    (tmp_path / "f").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = list(read_entries(tmp_path / "f"))
    assert [entry.error is not None for entry in found] == [False, True, False, True, True, False]
    assert [entry.position.line for entry in found] == [1, 2, 3, 4, 5, 6]


def test_a_missing_comma_costs_the_record_behind_it(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "f", f"[{GOOD} {GOOD}, {GOOD}]")
    assert [entry.error is not None for entry in read_entries(path)] == [False, True, False]


@pytest.mark.parametrize("cut", range(1, 40))
def test_every_cut_is_an_error(tmp_path: pathlib.Path, cut: int) -> None:
    text = f"[{GOOD}, {GOOD}]".encode()
    (tmp_path / "f").write_bytes(text[:-cut])
    with pytest.raises(RecordError, match="the file is cut off"):
        list(read_entries(tmp_path / "f"))


@hypothesis.given(st.data(), st.booleans())
def test_one_wrong_byte_costs_few_records(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, lines: bool
) -> None:
    """Wherever it is: an error about the file, or all records but those beside it, and one that is bad."""
    objects = [{"id": str(i), "image": "x", "conversations": conversation("q", "a, { b")} for i in range(6)]
    text = bytearray(("\n".join(map(json.dumps, objects)) if lines else json.dumps(objects)).encode())
    at = data.draw(st.integers(1, len(text) - 1))
    text[at : at + 1] = data.draw(
        st.sampled_from([b"", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\xff", b"\n"])
    )
    path = tmp_path_factory.getbasetemp() / "wrong.json"
    path.write_bytes(text)
    try:
        entries = list(read_entries(path))
    except RecordError as error:
        assert re.search(r"wrong\.json: (record \d+, line \d+, byte \d+|the file)", str(error))
        return
    lost = [i for i, one in enumerate(objects) if one not in [entry.value for entry in entries]]
    assert len(lost) <= 2 and (not lost or lost[-1] - lost[0] == len(lost) - 1)
    assert [entry.position.index for entry in entries] == list(range(len(entries)))


def test_a_mistake_is_found_without_reading_to_the_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", 1 << 10)
    path = write(tmp_path / "f", '[{"a": 1, b: 2},' + '{"c": 3},' * 100_000 + "{}]")
    with open(path, "rb") as file:
        reader = json_stream._Array(file, "f", Position(0, 0, 1), None, b"")
        error = next(reader.entries(opened=False)).error
        assert "record 0, line 1, byte 1: Expecting property name" in str(error)
        assert file.tell() < 1 << 14


def test_an_endless_record_is_given_up(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is the search for the next one: what is lost silently would be without limit."""
    monkeypatch.setattr(json_stream, "_CHUNK", 1 << 10)
    monkeypatch.setattr(json_stream, "_LARGEST_RECORD", 1 << 12)
    path = write(tmp_path / "f", '[{"a": "' + "x" * 100_000 + '"}]')
    entries = read_entries(path)
    assert "Unterminated string" in str(next(entries).error)
    with pytest.raises(RecordError, match="no next record within 4096 characters"):
        next(entries)
    write(path, '{"a": "' + "x" * 100_000 + '"}')
    with pytest.raises(RecordError, match="line is longer than 4096"):
        next(read_entries(path))


def test_files_that_are_no_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f.gz").write_bytes(gzip.compress(b"[]"))
    (tmp_path / "utf16").write_bytes("[]".encode("utf-16"))
    (tmp_path / "latin").write_bytes(b'[{"a": "caf\xe9"}]')
    for name in ("f.gz", "utf16"):
        with pytest.raises(RecordError, match=r"expected a JSON array .* as UTF-8. Unpack it"):
            list(read_records(tmp_path / name))
    with pytest.raises(RecordError, match=r"record 0, .*: not UTF-8 at byte 10 of it; save it as UTF-8"):
        list(read_records(tmp_path / "latin"))
    with pytest.raises(FileNotFoundError):
        list(read_records(tmp_path / "absent"))


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("lines", [False, True])
def test_split(tmp_path: pathlib.Path, bom: str, lines: bool) -> None:
    objects = [{"id": str(i)} for i in range(7)]
    text = "\n".join(map(json.dumps, objects)) if lines else json.dumps(objects)
    path = write(tmp_path / "f", bom + text)
    split = split_entries(path, 3)
    assert (split.entries, [span.count for span in split.spans]) == (7, [3, 3, 1])
    assert split.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    read = [[entry.value for entry in read_span(path, span)] for span in split.spans]
    assert read == [objects[:3], objects[3:6], objects[6:]]


@pytest.mark.parametrize("indent", [None, 1])
def test_memory_does_not_grow_with_the_file(tmp_path: pathlib.Path, indent: int | None) -> None:
    obj = {"id": "1", "conversations": conversation("q" * 50, "a" * 1000)}
    path = write(tmp_path / "f", json.dumps([obj] * 15_000, indent=indent))
    assert path.stat().st_size > 15e6
    tracemalloc.start()
    assert split_entries(path, 1000).entries == 15_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
