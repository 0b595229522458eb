"""Killed at any moment, the next run goes on: same results, nothing that was answered is asked again."""

import asyncio
import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from sg4v_jax.caption.collect.collection import open_collection
from sg4v_jax.caption.collect.collector import Collector, Pace
from sg4v_jax.caption.collect.endpoint import Endpoint
from sg4v_jax.caption.collect.journal import Journal, locked
from tests.caption.collect import faults
from tests.caption.collect.collecting import captions, collect, lines, settings
from tests.caption.collect.endpoint import FaultyEndpoint

Images = dict[str, str]


def wait_for(process: subprocess.Popen[str], endpoint: FaultyEndpoint, requests: int) -> None:
    while len(endpoint.asked) < requests:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def test_killed_among_faults(tmp_path: pathlib.Path) -> None:
    """SIGKILL after some requests, in the midst of others; `faults.py` makes sure of the rest."""
    print(faults.run(tmp_path, images=16, kills=3))


def test_a_signal_ends_the_run_in_order(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """What is under way is waited for; nothing is left open, so nothing can be paid twice."""
    endpoint.delay = 0.05
    process = faults.start(root, tmp_path / "out", endpoint.url)
    wait_for(process, endpoint, 6)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 1 and "stopped by SIGINT" in said, said
    results = lines(tmp_path / "out/results.jsonl")
    answers = sum(line["event"] == "answer" for line in results)
    assert answers == sum(line["event"] == "ask" for line in results) == len(endpoint.asked)
    assert 6 <= answers <= 6 + 2 * faults.WORKERS and len(captions(tmp_path / "out")) == answers
    assert collect(images, root, tmp_path / "out", endpoint.url)[0].captioned == len(images)
    assert len(endpoint.asked) == len(images)


def test_cut_at_any_byte(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A file that ends anywhere, as after a power cut: only what is missing is asked again."""
    some = dict(list(images.items())[:6])
    whole = tmp_path / "whole"
    endpoint.faults = {next(iter(some.values())): ["refusal", "500"]}
    collect(some, root, whole, endpoint.url)
    content, expected = (whole / "results.jsonl").read_bytes(), captions(whole)
    scan = (whole / "images.jsonl").read_bytes()
    rng = random.Random(3)
    for number, at in enumerate([0, 1, len(content) - 1, *rng.choices(range(len(content)), k=17)]):
        output = tmp_path / f"cut{number}"
        output.mkdir()
        (output / "results.jsonl").write_bytes(content[:at])
        (output / "images.jsonl").write_bytes(scan[: rng.randrange(len(scan))])
        kept = [json.loads(line) for line in content[:at].split(b"\n")[:-1]]
        done = sum(line.get("verdict") == "accepted" for line in kept)
        ended = sum(line["event"] in ("answer", "error") for line in kept)
        before = len(endpoint.asked)
        summary, _, ledger = collect(some, root, output, endpoint.url)
        assert summary.captioned == 6 and captions(output) == expected
        assert len(endpoint.asked) - before == 6 - done
        assert ledger.cut_off == sum(line["event"] == "ask" for line in kept) - ended
        for line in (output / "results.jsonl").read_bytes().splitlines():
            json.loads(line)


def test_a_full_disk_leaves_no_half_line(
    endpoint: FaultyEndpoint,
    images: Images,
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever write fails, the error comes through, and the next run finds whole lines."""
    some = list(images)[:3]
    for failing in range(2, 8):
        calls, output = iter(range(100)), tmp_path / f"out{failing}"

        def fsync(_: int, calls: Iterator[int] = calls, failing: int = failing) -> None:
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, "no space")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(os, "fsync", fsync)
            collect(some, root, output, endpoint.url)
        assert collect(some, root, output, endpoint.url)[0].captioned == 3


def test_half_a_write_is_taken_back(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"a": 1})
    raw = journal._file

    class NearlyFull:
        def write(self, data: bytes) -> int:
            return raw.write(data[:5])

        def __getattr__(self, name: str) -> object:
            return getattr(raw, name)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(journal, "_file", NearlyFull())
        journal.append({"a": 2}, {"a": 3})
    journal.append({"a": 4})
    assert [entry for _, entry in journal.entries()] == [{"a": 1}, {"a": 4}]


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl: line 2 is damaged"):
        list(Journal(path).entries())


def test_lines_with_unusual_breaks_are_one_line(tmp_path: pathlib.Path) -> None:
    journal = Journal(tmp_path / "j")
    entries = [{"text": "a\u2028b\x85c\r\nd\x1c"}, {"text": "e"}]
    assert [journal.append(entry) for entry in entries] == [0, (tmp_path / "j").read_bytes().index(b"\n") + 1]
    found = list(journal.entries())
    assert [entry for _, entry in found] == entries
    assert [journal.at(offset) for offset, _ in found] == entries


def test_one_process_at_a_time(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="another process is collecting there"):
        collect(images, root, tmp_path / "out", endpoint.url)
    assert collect(images, root, tmp_path / "out", endpoint.url)[0].captioned == len(images)


def test_an_answer_is_on_disk_before_its_worker_asks_again(
    endpoint: FaultyEndpoint, images: Images, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "out"
    seen: list[int] = []

    class Watching(Endpoint):
        async def complete(self, body: bytes) -> object:
            seen.append(sum(line["event"] == "answer" for line in lines(output / "results.jsonl")))
            return await super().complete(body)

    with open_collection(list(images), root, output, settings()) as collection:

        async def main() -> None:
            await Collector(collection, Watching(endpoint.url), Pace(workers=1)).run()

        asyncio.run(main())
    assert seen == list(range(len(images)))
