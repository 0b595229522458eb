"""Building a dataset: what is stored, what is refused, what is reported."""

import json
import os
import pathlib
from typing import Any

import pytest

from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import RecordError, parse_record, read_records
from tests.conftest import TinyWorld


def record(id: str, image: Any = None, answer: str = "A cup.") -> dict[str, Any]:
    question = "What is it?" if image is None else "<image>\nWhat is it?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, **({} if image is None else {"image": image}), "conversations": turns}


@pytest.fixture
def images(tiny_world: TinyWorld, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a good image, a cut-off one, and a good one beside it, out of reach."""
    root = tmp_path / "images"
    root.mkdir()
    data = sorted((tiny_world.image_root / "photos").iterdir())[0].read_bytes()
    (root / "good.jpg").write_bytes(data)
    (root / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "secret.jpg").write_bytes(data)
    os.symlink(tmp_path / "secret.jpg", root / "link.jpg")
    return root


def build_records(records: list[Any], images: pathlib.Path, policy: str = "fail", name: str = "x") -> Any:
    file = images.parent / f"{name}.json"
    file.write_text(json.dumps(records))
    return build(name, file, images, images.parent / "datasets", bad_records=policy)


def test_bytes_and_records_are_stored_as_they_are(tiny_world: TinyWorld) -> None:
    """Text-only and several-image records too: everything comes back as it was written."""
    source = tiny_world.directory / "sft_mix.json"
    objects = list(read_records(source))
    dataset = open_dataset(tiny_world.mix)
    assert len(dataset) == len(objects)
    stored = {}
    for i in range(len(dataset)):
        found, images = decode_example(dataset[i], "mix", i)
        stored[found.id] = found
        files = [(tiny_world.image_root / name).read_bytes() for name in found.images]
        assert images == files
    expected = {str(o["id"]): parse_record(o, source="mix", index=i) for i, o in enumerate(objects)}
    assert stored == expected
    assert any(not one.images for one in stored.values())


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (record("m", "missing.jpg"), ImageError, r"missing\.jpg: can't be read below .*: No such file"),
        (record("c", "cut.jpg"), ImageError, r"cut\.jpg: can't be decoded"),
        (record("e", "../secret.jpg"), RecordError, r"'\.\./secret\.jpg' holds '\.\.'"),
        (record("a", "/etc/hostname"), RecordError, r"'/etc/hostname' is absolute"),
        (record("l", "link.jpg"), RecordError, r"'link\.jpg' leads out of the image root"),
        (record("d", "."), ImageError, r"\.: can't be read below"),
        ({"id": "b", "conversations": []}, RecordError, r"record 1 \(id 'b'\)"),
        (record("b", answer=" "), RecordError, "'value' is empty"),
    ],
)
def test_fail_and_drop(images: pathlib.Path, bad: Any, kind: type[Exception], message: str) -> None:
    records = [record("0", "good.jpg"), bad, record("2")]
    with pytest.raises(kind, match=message):
        build_records(records, images, "fail", "failing")
    with pytest.raises(FileNotFoundError):  # Nothing half built is left to be found.
        open_dataset(images.parent / "datasets/llava/failing/1.0.0")
    directory, report = build_records(records, images, "drop", "dropping")
    assert (report.written, report.dropped) == (2, {kind.__name__: 1})
    assert list(report.examples) == [kind.__name__]
    assert sorted(ids_of(directory)) == ["0", "2"]


def ids_of(directory: pathlib.Path) -> list[str]:
    dataset = open_dataset(directory)
    return [decode_example(dataset[i], "x", i)[0].id for i in range(len(dataset))]


def test_several_images_and_repeated_ids(images: pathlib.Path) -> None:
    two = record("same", ["good.jpg", "good.jpg"])
    two["conversations"][0]["value"] = "<image>\n<image>\nSame?"
    directory, report = build_records([record("same", "good.jpg"), record("same"), two], images)
    assert report.written == 3
    dataset = open_dataset(directory)
    found = [decode_example(dataset[i], "x", i) for i in range(3)]
    assert [one.id for one, _ in found] == ["same"] * 3
    assert sorted(len(stored) for _, stored in found) == [0, 1, 2]
    data = (images / "good.jpg").read_bytes()
    assert all(image == data for _, stored in found for image in stored)


def test_jsonl(images: pathlib.Path) -> None:
    file = images.parent / "lines.jsonl"
    file.write_text("".join(json.dumps(record(str(i))) + "\n" for i in range(3)))
    directory, report = build("lines", file, images, images.parent / "datasets")
    assert report.written == 3
    assert sorted(ids_of(directory)) == ["0", "1", "2"]


def test_an_existing_dataset_is_left_as_it_is(images: pathlib.Path) -> None:
    directory, _ = build_records([record("old")], images)
    again, report = build_records([record("new"), record("newer")], images)
    assert again == directory
    assert report.written == 0
    assert ids_of(again) == ["old"]


@pytest.mark.parametrize("policy", ["fail", "drop"])
def test_a_broken_file_stops_the_build(images: pathlib.Path, policy: str) -> None:
    """Where the next record starts can't be known: only whole records can be dropped."""
    with pytest.raises(RecordError, match=r"x\.json: record 1, line 1, character \d+: expected a record"):
        build_records([record("0"), ["no", "object"]], images, policy)
    with pytest.raises(FileNotFoundError):
        open_dataset(images.parent / "datasets/llava/x/1.0.0")


def test_progress_sees_every_record(images: pathlib.Path) -> None:
    seen = []
    file = images.parent / "p.json"
    file.write_text(json.dumps([record(str(i)) for i in range(4)]))

    def progress(records: Any) -> Any:
        for one in records:
            seen.append(one["id"])
            yield one

    build("p", file, images, images.parent / "datasets", progress=progress)
    assert seen == ["0", "1", "2", "3"]


def test_errors_name_the_thing(images: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="bad_records 'skip' is not one of"):
        build_records([record("0")], images, "skip")
    with pytest.raises(FileNotFoundError, match="build one with `sg4v data build`"):
        open_dataset(images.parent / "datasets/llava/none/1.0.0")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        build("none", images.parent / "none.json", images, images.parent / "datasets")
