"""Building a dataset: what is stored, what is refused, what is reported."""

import json
import pathlib
from typing import Any

import pytest

from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import RecordError, parse_record, read_records
from tests.conftest import TinyWorld
from tests.data.datasets import contents, ids_of, record


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
    ("bad", "error", "kind", "message"),
    [
        (
            record("m", "missing.jpg"),
            ImageError,
            "missing_image",
            r"missing\.jpg: no such file below .*images",
        ),
        (record("c", "cut.jpg"), ImageError, "corrupt_image", r"cut\.jpg: can't be decoded"),
        (record("e", "../secret.jpg"), RecordError, "path_outside", r"'\.\./secret\.jpg' holds '\.\.'"),
        (record("a", "/etc/hostname"), RecordError, "path_outside", r"'/etc/hostname' is absolute"),
        (record("l", "link.jpg"), RecordError, "path_outside", r"'link\.jpg' leads out of the image root"),
        (record("d", "."), ImageError, "unreadable_image", r"\.: can't be read below"),
        ({"id": "b", "conversations": []}, RecordError, "no_answer", "'conversations' has 0"),
        (record("b", answer=" "), RecordError, "empty_answer", "'value' is empty"),
        (["no", "object"], RecordError, "malformed_record", r"expected a JSON object, found list"),
    ],
)
def test_fail_and_drop(
    images: pathlib.Path, bad: Any, error: type[Exception], kind: str, message: str
) -> None:
    records = [record("0", "good.jpg"), bad, record("2")]
    with pytest.raises(error, match=rf"failing\.json: record 1, line 1, byte \d+.*: .*{message}"):
        build_records(records, images, "fail", "failing")
    with pytest.raises(FileNotFoundError):  # Nothing half built is left to be found.
        open_dataset(images.parent / "datasets/llava/failing/1.0.0")
    directory, report = build_records(records, images, "drop", "dropping")
    assert (report.written, report.dropped) == (2, {kind: 1})
    assert list(report.examples) == [kind]
    assert ids_of(directory) == ["0", "2"]


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
    """And is not taken for one of other records."""
    directory, first = build_records([record("old")], images)
    before = contents(directory)
    again, report = build_records([record("old")], images)
    assert (again, report) == (directory, first)
    with pytest.raises(ValueError, match="a dataset of other records or settings already; choose another"):
        build_records([record("new"), record("newer")], images)
    assert contents(directory) == before
    assert ids_of(again) == ["old"]


@pytest.mark.parametrize("policy", ["fail", "drop"])
def test_a_cut_off_file_stops_the_build(images: pathlib.Path, policy: str) -> None:
    """At once: what is missing is not one record."""
    file = images.parent / "cut.json"
    file.write_text(json.dumps([record(str(i)) for i in range(9)])[:-50])
    with pytest.raises(RecordError, match=r"cut\.json: record 8, line 1, byte \d+: .*the file is cut off"):
        build("cut", file, images, images.parent / "datasets", bad_records=policy)
    assert not (images.parent / "datasets").exists()


def test_a_broken_entry_costs_one_record(images: pathlib.Path) -> None:
    file = images.parent / "broken.json"
    file.write_text("[" + ", ".join([json.dumps(record("0")), '{"id": tru}', json.dumps(record("2"))]) + "]")
    directory, report = build("broken", file, images, images.parent / "datasets", bad_records="drop")
    assert report.dropped == {"malformed_json": 1}
    assert ids_of(directory) == ["0", "2"]


def test_progress_sees_every_record(images: pathlib.Path) -> None:
    """And how many there will be."""
    seen = []
    file = images.parent / "p.json"
    file.write_text(json.dumps([record(str(i)) for i in range(4)]))

    def progress(records: Any) -> Any:
        for one in records:
            seen.append(len(records))
            yield one

    build("p", file, images, images.parent / "datasets", records_per_shard=3, progress=progress)
    assert seen == [4] * 4


def test_errors_name_the_thing(images: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="bad_records 'skip' is not one of"):
        build_records([record("0")], images, "skip")
    with pytest.raises(FileNotFoundError, match="build one with `sg4v data build`"):
        open_dataset(images.parent / "datasets/llava/none/1.0.0")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        build("none", images.parent / "none.json", images, images.parent / "datasets")
    with pytest.raises(FileNotFoundError, match="no-such: no such image folder"):
        build("none", None, images / "no-such", images.parent / "datasets")
    with pytest.raises(RecordError, match=r"x\.json: no record to store; dropped: \{'no_answer': 1\}"):
        build_records([{"conversations": []}], images, "drop")
    with pytest.raises(ValueError, match="mount the bucket"):
        open_dataset("gs://bucket/datasets/llava/x/1.0.0")


# --- The cap on bad records ----------------------------------------------------------------------


@pytest.mark.parametrize(("max_bad", "fits"), [("10%", True), ("9.9%", False), ("1", True), ("0", False)])
def test_the_cap(images: pathlib.Path, max_bad: str, fits: bool) -> None:
    """A build that failed at the cap goes on under a higher one."""
    file = images.parent / "capped.json"
    file.write_text(json.dumps([record(str(i), answer="a" if i != 6 else "") for i in range(10)]))
    settings: dict[str, Any] = {"bad_records": "drop", "records_per_shard": 4}
    arguments = ("capped", file, images, images.parent / "datasets")
    if not fits:
        with pytest.raises(RecordError, match=rf"1 bad records so far of 10, more than max_bad {max_bad}"):
            build(*arguments, max_bad=max_bad, **settings)
    directory, report = build(*arguments, max_bad=max_bad if fits else "1", **settings)
    assert report.dropped == {"empty_answer": 1}
    assert ids_of(directory) == [str(i) for i in range(10) if i != 6]


def test_a_cap_that_means_nothing(images: pathlib.Path) -> None:
    arguments = ("c", images.parent / "c.json", images, images.parent / "datasets")
    for cap in ("many", "-1", "101%", "%", ""):
        with pytest.raises(ValueError, match="write 100 or 1%"):
            build(*arguments, bad_records="drop", max_bad=cap)
    with pytest.raises(ValueError, match="goes with bad_records 'drop'"):
        build(*arguments, max_bad="1%")
