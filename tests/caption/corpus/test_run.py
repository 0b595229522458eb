"""What a run writes, and that it is the same however the run was cut up."""

import json
import os
import pathlib
import threading
from typing import Any

import pytest

from sg4v_jax.caption.corpus.guards import Guards
from sg4v_jax.caption.corpus.inputs import open_corpus
from sg4v_jax.caption.corpus.outputs import Summary
from tests.caption.corpus.fake import PROMPT, FakeEngine, caption, write_images

COUNT = 61


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root, COUNT)
    return root


def files(output: pathlib.Path) -> dict[str, bytes]:
    """All that a finished job leaves, by path."""
    return {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != "clock"
    }


def lines(output: pathlib.Path) -> list[dict[str, Any]]:
    shards = sorted((output / "shards").iterdir())
    return [json.loads(line) for path in shards for line in path.read_text().split("\n")[:-1]]


def test_one_line_for_each_image_in_order(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    engine = FakeEngine()
    summary = caption(root, tmp_path, engine)
    found = lines(tmp_path)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert [line["image"] for line in found] == names and len(names) == COUNT
    assert len(list((tmp_path / "shards").iterdir())) == 9
    broken = {name for name in names if int(name[2:6]) % 23 == 5}
    assert {line["image"] for line in found if "error" in line} == broken
    assert all(
        line["image"] in line["error"] and line["kind"] == "corrupt_image"
        for line in found
        if "error" in line
    )
    assert summary == Summary(
        tmp_path / "captions.json",
        COUNT,
        COUNT - len(broken),
        {"repetition": 4},
        {"corrupt_image": len(broken)},
        retried=0,
        tokens=sum(line.get("tokens", 0) for line in found),
    )
    records = json.loads((tmp_path / "captions.json").read_text())
    assert records == [
        {
            "id": line["image"][2:6],
            "image": line["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPT}"},
                {"from": "gpt", "value": line["caption"]},
            ],
        }
        for line in found
        if "caption" in line
    ]
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert errors == [line for line in found if "error" in line]
    assert len({request.options.seed for request in engine.asked}) == len(engine.asked)
    assert not [path for path in (tmp_path / "work").iterdir() if path.name != "clock"]


def test_a_finished_job_is_left_as_it_is(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    caption(root, tmp_path)
    before, engine = files(tmp_path), FakeEngine()
    caption(root, tmp_path, engine)
    assert files(tmp_path) == before and not engine.asked


def test_the_engine_stays_full_across_shards(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Requests of the next shard come while the last ones of the one before are under way."""

    class Counting(FakeEngine):
        calls = 0

        def complete(self, requests: Any) -> Any:
            self.calls += 1
            return super().complete(requests)

    engine = Counting(slots=5)
    caption(root, tmp_path, engine)
    assert engine.calls == 1


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_shards_don_t_change_captions(size: int, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    caption(root, tmp_path / "a")
    caption(root, tmp_path / "b", FakeEngine(slots=3), shard_size=size, read_ahead=2)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    same = ("captions.json", "errors.jsonl", "summary.json")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in same)


class Crash(BaseException):
    """The machine goes down: nothing happens after it."""


def test_cut_off_at_any_change_of_a_file(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the n-th write, link, rename, removal and so on, for every n, and after half a write."""
    some, names = tmp_path / "images.json", open_corpus(root)
    some.write_text(json.dumps([names.name(index) for index in range(9)]))

    def start(output: pathlib.Path) -> None:
        caption(some, output, root=root, shard_size=4, lease_seconds=0.0, guards=Guards(retry=1))

    start(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    left = [0]

    def failing(name: str) -> Any:
        real = getattr(os, name)

        def change(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return real(*args, **kwargs)  # A heartbeat.
            left[0] -= 1
            if left[0] < 0:
                if left[0] == -1 and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Crash
            return real(*args, **kwargs)

        return change

    crashes = 0
    while True:
        output = tmp_path / f"crash{crashes}"
        left[0] = crashes
        with monkeypatch.context() as patch:
            for name in ("write", "link", "replace", "unlink", "utime", "fsync", "ftruncate", "chmod"):
                patch.setattr(os, name, failing(name))
            try:
                start(output)
            except Crash:
                pass
            else:
                break
        start(output)
        assert files(output) == expected, f"stopped before change {crashes}"
        crashes += 1
    assert crashes > 40
