"""Building from a plain folder, and from and to buckets."""

import json
import os
import pathlib
import shutil
from typing import Any

import fsspec.implementations.dirfs
import pytest
from etils import epath

from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.records import Record, RecordError, Turn
from tests.data.datasets import contents, record


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
