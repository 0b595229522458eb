"""Shards: any number of processes, killed at any moment, and the same files."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import tensorflow_datasets as tfds

from sg4v_jax.data import build as build_module
from sg4v_jax.data.build import build, open_dataset
from sg4v_jax.data.image import ImageError
from sg4v_jax.data.records import RecordError
from tests.data.datasets import contents, ids_of, record
from tests.data.planted import plant

REPOSITORY = pathlib.Path(__file__).parents[2]


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


@pytest.mark.slow
def test_goes_on_after_a_kill_of_several_processes(tmp_path: pathlib.Path) -> None:
    """The command, killed from outside while its workers write; half of what they wrote is of no harm."""
    planted = plant(tmp_path, 1200)
    argv = [sys.executable, "-m", "sg4v_jax", "data", "build", "--name=p", "--bad-records=drop"]
    argv += [f"--json={planted.file}", f"--images={planted.image_root}", "--records-per-shard=8"]
    argv += [f"--output={tmp_path / 'killed'}", "--workers=2"]
    command = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    directory = tmp_path / "killed/llava/p/1.0.0"
    while len(list(directory.glob(".build/0*.json"))) < 5:
        assert command.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    command.kill()
    assert command.wait() == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        open_dataset(directory)
    arguments = ("p", planted.file, planted.image_root)
    settings: dict[str, Any] = {"bad_records": "drop", "records_per_shard": 8}
    again, report = build(*arguments, tmp_path / "killed", **settings)
    whole, expected = build(*arguments, tmp_path / "whole", **settings)
    assert (os.fspath(again), report) == (os.fspath(directory), expected)
    assert contents(directory) == contents(pathlib.Path(whole))


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
