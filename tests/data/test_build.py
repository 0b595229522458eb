"""Building a dataset: what is stored, what is refused, what is reported."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import fsspec.implementations.dirfs
import pytest
import tensorflow_datasets as tfds
from etils import epath

from sg4v_jax.data import build as build_module
from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import Record, RecordError, Turn, parse_record, read_records
from tests.conftest import TinyWorld

REPOSITORY = pathlib.Path(__file__).parents[2]


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
    """And is not taken for one of other records."""
    directory, first = build_records([record("old")], images)
    before = contents(directory)
    again, report = build_records([record("old")], images)
    assert (again, report) == (directory, first)
    with pytest.raises(ValueError, match="a dataset of other records or settings already; choose another"):
        build_records([record("new"), record("newer")], images)
    assert contents(directory) == before
    assert ids_of(again) == ["old"]


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in pathlib.Path(directory).rglob("*")
        if path.is_file()
    }


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


# --- Shards --------------------------------------------------------------------------------------


@pytest.fixture
def many(images: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """(a file of 60 records, ten of them bad and one whole shard of those; the images)."""
    objects = [record(f"é{i}", "good.jpg" if i % 3 else None, answer="a" * (i + 1)) for i in range(60)]
    for i in [3, 17, *range(20, 28)]:
        objects[i] = record(str(i), "missing.jpg")
    file = images.parent / "many.json"
    file.write_text(json.dumps(objects, ensure_ascii=False))
    return file, images


def build_many(many: tuple[pathlib.Path, pathlib.Path], place: str, **settings: Any) -> pathlib.Path:
    file, images = many
    directory, report = build(
        "many", file, images, images.parent / place, bad_records="drop", records_per_shard=4, **settings
    )
    assert (report.written, report.dropped) == (50, {"missing_image": 10})
    return pathlib.Path(directory)


def test_workers_change_nothing(many: tuple[pathlib.Path, pathlib.Path]) -> None:
    """Same bytes in the same files; the records are in the order of the file; an empty shard is fine."""
    alone = build_many(many, "one")
    together = build_many(many, "three", workers=3)
    assert contents(alone) == contents(together)
    assert len(contents(alone)) == 15 + 3
    assert ids_of(alone) == [f"é{i}" for i in range(60) if i not in [3, 17, *range(20, 28)]]
    info = tfds.builder_from_directory(os.fspath(alone)).info
    assert info.splits["train"].num_examples == 50
    assert info.splits["train"].shard_lengths[5:7] == [0, 0]


KILLED = """
import os, sys
from sg4v_jax.data import build
write_shard, count = build.write_shard, 0
def counted(shard):
    global count
    count += 1
    if count > 5:
        # In the middle of a shard: a part of it is written, nothing says it is finished.
        with build._new_file(shard.path, build.epath.Path(shard.mark).parent) as path:
            open(path, "wb").write(b"half")
            os.kill(os.getpid(), 9)
    return write_shard(shard)
build.write_shard = counted
build.build("many", sys.argv[1], sys.argv[2], sys.argv[3], bad_records="drop", records_per_shard=4)
"""


def test_goes_on_after_a_kill(
    many: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are not built again, and the result is that of an undisturbed build."""
    file, images = many
    place = images.parent / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, file, images, place], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    directory = place / "llava/many/1.0.0"
    with pytest.raises(FileNotFoundError):
        open_dataset(directory)
    finished = {path: path.stat().st_mtime_ns for path in directory.glob("llava-train*")}
    assert len(finished) == 5

    reads = []
    inspect = build_module.inspect_entry
    monkeypatch.setattr(
        build_module, "inspect_entry", lambda entry, **keys: reads.append(entry) or inspect(entry, **keys)
    )
    assert build_many(many, "killed") == directory
    assert len(reads) == 60 - 5 * 4
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(directory) == contents(build_many(many, "undisturbed"))


def test_a_kill_of_the_parent_ends_its_workers(many: tuple[pathlib.Path, pathlib.Path]) -> None:
    """They would otherwise wait for ever, and two builds write at once after a restart."""
    code = (
        "import os, time\n"
        "from sg4v_jax.data.processes import run_in_order\n"
        "if __name__ == '__main__':\n"
        "    for pid in run_in_order(sleeper, [0, 0, 60, 60], 2):\n"
        "        print(pid, flush=True)\n"
    )
    script = many[0].parent / "parent.py"
    script.write_text("import os, time\ndef sleeper(s):\n    time.sleep(s)\n    return os.getpid()\n" + code)
    environment = os.environ | {"PYTHONPATH": os.fspath(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    workers = {int(parent.stdout.readline()), int(parent.stdout.readline())}
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "the workers live on"
        time.sleep(0.05)


def test_other_records_do_not_go_on_with_a_build(many: tuple[pathlib.Path, pathlib.Path]) -> None:
    file, images = many
    place = images.parent / "mixed"
    with pytest.raises(ImageError):
        build("many", file, images, place, records_per_shard=4)
    with pytest.raises(ValueError, match="an unfinished build of other records or settings"):
        build("many", file, images, place, records_per_shard=5)
    file.write_text(json.dumps([record("0")]))
    with pytest.raises(ValueError, match="an unfinished build of other records or settings"):
        build("many", file, images, place, records_per_shard=4)


def test_fail_after_drop_still_fails(many: tuple[pathlib.Path, pathlib.Path]) -> None:
    file, images = many
    place = images.parent / "strict"
    settings: dict[str, Any] = {"records_per_shard": 4}
    with pytest.raises(RecordError, match="more than max_bad 5"):
        build("many", file, images, place, bad_records="drop", max_bad="5", **settings)
    with pytest.raises(RecordError, match=r"record 3, .*missing\.jpg: no such file"):
        build("many", file, images, place, **settings)


# --- Folders and URIs ----------------------------------------------------------------------------


def test_a_folder_of_images_to_caption(images: pathlib.Path) -> None:
    """Records without an answer: a captioner can take them, training can't."""
    (images / "sub").mkdir()
    data = (images / "good.jpg").read_bytes()
    (images / "sub/B.JPG").write_bytes(data)
    (images / "notes.txt").write_text("no image")
    directory, report = build("f", None, images, images.parent / "datasets", bad_records="drop")
    assert report.dropped == {"corrupt_image": 1, "path_outside": 1}
    dataset = open_dataset(directory)
    found = [decode_example(dataset[i], "f", i, answered=False) for i in range(len(dataset))]
    assert [one for one, _ in found] == [
        Record(name, (name,), (Turn("human", "<image>"),)) for name in ("good.jpg", "sub/B.JPG")
    ]
    assert [stored for _, stored in found] == [[data], [data]]
    with pytest.raises(RecordError, match="must end with an answer"):
        decode_example(dataset[0], "f", 0)
    assert build("f", None, images, images.parent / "datasets", bad_records="drop") == (directory, report)
    (images / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image below"):
        build("g", None, images / "empty", images.parent / "datasets")


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder that `gs://` stands for: what `etils.epath` asks fsspec for, without a network."""
    root = tmp_path / "bucket"
    root.mkdir()
    files = fsspec.implementations.dirfs.DirFileSystem(os.fspath(root), fsspec.filesystem("file"))
    backend = epath.backend.fsspec_backend
    original = backend.fs
    fake = _Bucket(files)
    monkeypatch.setattr(
        backend, "fs", lambda path: fake if os.fspath(path).startswith("gs://") else original(path)
    )
    return root


class _Bucket:
    """Takes the scheme off, as gcsfs does, and makes folders as they are needed, as object stores do."""

    def __init__(self, files: Any):
        self._files = files

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._files, name)

        def call(path: Any, *arguments: Any, **keys: Any) -> Any:
            path = os.fspath(path).removeprefix("gs://")
            if name == "open" and "w" in keys.get("mode", ""):
                self._files.makedirs(os.path.dirname(path), exist_ok=True)
            return method(path, *arguments, **keys)

        return call


@pytest.mark.parametrize("json_file", [True, False])
def test_buckets(images: pathlib.Path, bucket: pathlib.Path, json_file: bool) -> None:
    """From a bucket to a bucket: the same files as from a folder to a folder."""
    for link in ("link.jpg", "cut.jpg"):
        (images / link).unlink()
    shutil.copytree(images, bucket / "images")
    records = json.dumps([record("0", "good.jpg"), record("1"), record("2", "no.jpg"), record("3", "../x")])
    (bucket / "x.json").write_text(records)
    (images.parent / "x.json").write_text(records)
    source = "gs://x.json" if json_file else None
    settings: dict[str, Any] = {"bad_records": "drop", "records_per_shard": 2}
    place, report = build("x", source, "gs://images", "gs://out", **settings)
    assert os.fspath(place) == "gs://out/llava/x/1.0.0"
    local = images.parent / "x.json" if json_file else None
    directory, expected = build("x", local, images, images.parent / "out", **settings)
    assert (
        report.dropped == expected.dropped == ({"missing_image": 1, "path_outside": 1} if json_file else {})
    )
    made, wanted = contents(bucket / "out/llava/x/1.0.0"), contents(pathlib.Path(directory))
    made.pop("build_report.json"), wanted.pop("build_report.json")  # Its messages name the paths.
    assert made == wanted
