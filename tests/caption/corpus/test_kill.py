"""Killed at random points, on one process and on two: nothing is lost, doubled or changed."""

import contextlib
import multiprocessing
import multiprocessing.process
import pathlib
import random
import signal
import time

import pytest

from sg4v_jax.caption.corpus.guards import Guards
from tests.caption.corpus import fake
from tests.caption.corpus.fake import caption
from tests.caption.corpus.test_run import files

COUNT, KILLS = 900, 20
SECONDS = 0.004  # for a step of the fake, which is six words of each of four slots


@pytest.fixture(scope="module")
def undisturbed(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("undisturbed")
    caption(root, output, guards=Guards(retry=1), shard_size=64)
    return output


# Processes without JAX, forked from one that has imported everything: they start at once.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["pytest", "tests.caption.corpus.fake"])


def start(
    root: pathlib.Path, output: pathlib.Path, seconds: float = SECONDS
) -> multiprocessing.process.BaseProcess:
    process = forked.Process(target=fake.main, args=(root, output, seconds), kwargs={"shard_size": 64})
    process.start()
    return process


def done(output: pathlib.Path) -> int:
    """Lines that are on disk, of finished shards and of others."""
    total = 0
    for path in (*output.glob("shards/*.jsonl"), *output.glob("work/*.jsonl")):
        with contextlib.suppress(FileNotFoundError):  # Finished between looking and reading.
            total += path.read_bytes().count(b"\n") - (path.parent.name == "work")
    return total


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_kill_9(
    processes: int, root: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Twenty times SIGKILL: at random moments of the work, some of them of the start and of the end."""
    rng = random.Random(processes)
    targets = sorted(rng.sample(range(COUNT - 20), KILLS))
    running: list[multiprocessing.process.BaseProcess] = []
    log = []
    for number, target in enumerate(targets):
        running += [start(root, tmp_path) for _ in range(processes - len(running))]
        while done(tmp_path) < target and all(process.is_alive() for process in running):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        # On two, now one of them and now both.
        victims = running if number % 3 == 0 else [rng.choice(running)]
        for victim in victims:
            victim.kill()
        for victim in victims:
            victim.join()
            assert victim.exitcode == -signal.SIGKILL
        log.append(f"kill {number + 1}: {len(victims)} of {processes} at {done(tmp_path)} lines")
        running = [process for process in running if process not in victims]
    # Another number of processes goes on.
    running += [start(root, tmp_path, seconds=0) for _ in range(3 - len(running))]
    for process in running:
        process.join()
        assert process.exitcode == 0
    print("\n".join(log))
    # What killed processes were about to write is removed when it is certainly nobody's.
    caption(root, tmp_path, guards=Guards(retry=1), shard_size=64, lease_seconds=0)
    assert files(tmp_path) == files(undisturbed)
