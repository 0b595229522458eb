"""Shards have one owner at a time, the dead lose theirs at once, and nothing is lost either way."""

import json
import multiprocessing
import os
import pathlib
import time

import pytest

from sg4v_jax.caption.corpus import claims
from sg4v_jax.caption.corpus.claims import Claim, Shards, is_dead, owner, put_new

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["pytest", "tests.caption.corpus.fake"])


def some_lines(count: int) -> list[dict[str, object]]:
    return [{"index": index, "caption": "a\u2028b"} for index in range(count)]


def test_one_owner(tmp_path: pathlib.Path) -> None:
    first, second = Shards(tmp_path, 3), Shards(tmp_path, 3)
    assert [first.claim(range(3)).shard, second.claim(range(3)).shard] == [0, 1]  # type: ignore[union-attr]
    assert second.claim([0, 1]) is None and first.held() == [0]
    assert first.claim([2]) is not None and second.claim(range(3)) is None


def claim_all(output: str, barrier: object, queue: object) -> None:
    shards = Shards(pathlib.Path(output), 200)
    barrier.wait()  # type: ignore[attr-defined]
    won = []
    while claim := shards.claim(range(200)):
        won.append(claim.shard)
    queue.put(won)  # type: ignore[attr-defined]
    barrier.wait()  # type: ignore[attr-defined]


def test_processes_at_the_same_time(tmp_path: pathlib.Path) -> None:
    barrier, queue = forked.Barrier(4), forked.Queue()
    running = [forked.Process(target=claim_all, args=(str(tmp_path), barrier, queue)) for _ in range(4)]
    for process in running:
        process.start()
    won = [queue.get() for _ in running]
    for process in running:
        process.join()
    assert sorted(shard for part in won for shard in part) == list(range(200))


def test_what_the_dead_left(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's dead the work is taken over at once, of another's when it has been silent."""
    dead = owner() | {"pid": 2**22 + 1}
    assert is_dead(dead) and not is_dead(owner()) and not is_dead(owner() | {"machine": "another"})
    assert is_dead(owner() | {"started": "1"}), "the number was given to another process"

    with monkeypatch.context() as patch:
        patch.setattr(claims, "owner", lambda: dead)
        claim = Shards(tmp_path, 1).claim([0])
    assert claim
    for line in some_lines(3):
        claim.append(line)
    os.write(claim._descriptor, b'{"index": 3, "cap')
    taken = Shards(tmp_path, 1).claim([0])
    assert taken and taken.found == some_lines(3)

    with monkeypatch.context() as patch:
        patch.setattr(claims, "owner", lambda: owner() | {"machine": "another"})
        far = Shards(tmp_path / "far", 1, lease_seconds=50).claim([0])
    others = Shards(tmp_path / "far", 1, lease_seconds=0)
    assert far and others.claim([0]) is None, "it is the owner who says how long"
    os.utime(far.path, (time.time() - 49,) * 2)
    assert others.claim([0]) is None
    os.utime(far.path, (time.time() - 51,) * 2)
    assert others.claim([0]) is not None
    far.beat()
    assert far.lost


def test_a_released_shard_is_free_at_once(tmp_path: pathlib.Path) -> None:
    shards = Shards(tmp_path, 1)
    with shards.beating():
        claim = shards.claim([0])
        assert claim
        claim.append({"index": 0})
    again = Shards(tmp_path, 1).claim([0])
    assert again and again.found == [{"index": 0}]


def test_the_heart_beats(tmp_path: pathlib.Path) -> None:
    shards = Shards(tmp_path, 1, lease_seconds=0.25)
    with shards.beating():
        claim = shards.claim([0])
        assert claim
        os.utime(claim.path, (1, 1))
        while claim.path.stat().st_mtime == 1:
            time.sleep(0.01)
        claim.path.unlink()
        while not claim.lost:
            time.sleep(0.01)


def finish(shards: Shards, claim: Claim, caption: str) -> bool:
    return shards.finish(claim, [{"caption": caption}])


def test_the_first_finished_file_stays(tmp_path: pathlib.Path) -> None:
    """Two owners, because one was thought dead: the slower one's result does not count."""
    slow, quick = Shards(tmp_path, 1, lease_seconds=0), Shards(tmp_path, 1, lease_seconds=0)
    first, second = slow.claim([0]), quick.claim([0])
    assert first and second
    assert finish(quick, second, "quick") and not finish(slow, first, "slow")
    assert json.loads(slow.path(0).read_text()) == {"caption": "quick"}
    assert slow.finished() == {0} and not list((tmp_path / "work").glob("*.jsonl"))
    assert quick.claim([0]) is None


def test_file_systems_without_links(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for number in range(2):
        new = tmp_path / "new"
        new.write_text(str(number))
        assert put_new(new, tmp_path / "file") == (number == 0) and not new.exists()
    assert (tmp_path / "file").read_text() == "0"
    test_one_owner(tmp_path)


def test_a_full_disk_leaves_whole_lines(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Shards(tmp_path, 1, lease_seconds=0).claim([0])
    assert claim
    claim.append({"index": 0})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
        with pytest.raises(OSError, match="No space left"):
            claim.append({"index": 1})
    claim.append({"index": 2})
    again = Shards(tmp_path, 1, lease_seconds=0).claim([0])
    assert again and again.found == [{"index": 0}, {"index": 2}]


def test_damaged_lines_are_done_again(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    claim = Shards(tmp_path, 1, lease_seconds=0).claim([0])
    assert claim
    os.write(claim._descriptor, b"\0\0\0\n")
    claim.append({"index": 2})
    again = Shards(tmp_path, 1, lease_seconds=0).claim([0])
    assert again and again.found == [{"index": 2}]
    assert "a damaged line" in caplog.text
