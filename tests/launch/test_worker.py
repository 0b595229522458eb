"""The side of the workers: whatever is asked twice happens once."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.launch.conftest import REPOSITORY

WORKER = REPOSITORY / "launch/worker.py"


class Machine:
    """A home folder, and `worker.py` in it as ssh would run it."""

    def __init__(self, home: pathlib.Path):
        self.home, self.root = home, home / "sg4v"
        self.root.mkdir(parents=True)
        self.env = {"HOME": os.fspath(home), "PATH": os.environ["PATH"], "TPU_WORKER_ID": "3"}

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-S", os.fspath(WORKER), *arguments]
        return subprocess.Popen(argv, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __call__(self, *arguments: str) -> list[list[str]]:
        """What it said, line by line."""
        out, err = (process := self.popen(*arguments)).communicate()
        assert process.returncode == 0, err
        return [line.split("\t") for line in out.splitlines()]

    def pid(self, job: str) -> int:
        return int((self.root / "jobs" / job / "pid").read_text())


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    return Machine(tmp_path / "home")


def test_log_and_exit_code(machine: Machine) -> None:
    script = 'echo "$WORD $PWD"; echo err >&2; printf "10%%\\r20%%\\r\\n"; printf unfinished; exit 3'
    assert machine("start", "one", "--env=WORD=a b=c", "--", "bash", "-c", script) == [["@3", "start", "one"]]
    told = machine("logs", "--follow")
    assert told == [
        ["@3", "1", f"a b=c {machine.home}"],
        ["@3", "2", "err"],
        ["@3", "3", "20%"],
        ["@3", "4", "unfinished"],
        ["@3", "exit", "3"],
    ]
    # A new connection goes on behind what it has.
    assert machine("logs", "--follow", "--job=one", "--skip=2") == told[2:]


def test_a_repeated_start_is_the_same_job(machine: Machine) -> None:
    """gcloud runs a command again if its connection fails, whether or not it had run."""
    for _ in range(3):
        machine("start", "one", "--", "bash", "-c", "echo started; sleep 60")
    until(lambda: machine("logs", "--job=one") == [["@3", "1", "started"]])
    second = machine.popen("start", "two", "--", "true")
    assert "job one is running; stop it first" in second.communicate()[1] and second.returncode == 1
    assert machine("stop") == [["@3", "exit", "143"]]
    machine("start", "two", "--", "true")
    assert machine("logs", "--follow") == [["@3", "exit", "0"]]
    assert machine("logs", "--job=one") == [["@3", "1", "started"], ["@3", "exit", "143"]]
    # And after its end a job isn't started a second time either.
    machine("start", "two", "--", "false")
    assert machine("logs", "--follow") == [["@3", "exit", "0"]]


def test_stop_asks_first(machine: Machine) -> None:
    """SIGTERM reaches the command, which may save and choose its exit code."""
    script = 'trap "echo saved; exit 75" TERM; echo ready; while true; do sleep 0.05; done'
    machine("start", "one", "--", "bash", "-c", script)
    until(lambda: ["@3", "1", "ready"] in machine("logs"))
    assert machine("stop") == [["@3", "exit", "75"]]
    assert machine("logs") == [["@3", "1", "ready"], ["@3", "2", "saved"], ["@3", "exit", "75"]]
    machine("start", "two", "--", "bash", "-c", 'trap "" TERM; echo ready; while true; do sleep 0.05; done')
    until(lambda: ["@3", "1", "ready"] in machine("logs"))
    assert machine("stop", "--grace=0.3") == [["@3", "exit", "137"]]
    until(lambda: not running(machine, "two"))


def test_a_machine_that_was_shut_down(machine: Machine) -> None:
    assert machine("logs", "--follow") == [["@3", "exit", "none"]]
    assert machine("stop") == [["@3", "exit", "none"]]
    machine("start", "one", "--", "sleep", "60")
    os.killpg(machine.pid("one"), signal.SIGKILL)
    assert machine("logs", "--follow") == [["@3", "exit", "lost"]]
    # Its number may be somebody else's by now, who is not to be stopped.
    (machine.root / "jobs/one/pid").write_text(str(os.getpid()))
    assert machine("stop") == [["@3", "exit", "lost"]]


def test_long_lines_come_in_pieces(machine: Machine) -> None:
    """Of at most what a pipe takes at once, or the outputs of two workers could mix."""
    machine("start", "one", "--", sys.executable, "-c", "print('x' * 7000)")
    told = machine("logs", "--follow")
    assert [len(line[2]) for line in told] == [3000, 3000, 1000, 1]
    assert [line[1] for line in told] == ["1", "2", "3", "exit"]
    assert machine("logs", "--skip=2") == told[2:]


def test_no_such_command(machine: Machine) -> None:
    machine("start", "one", "--", "no-such-program")
    assert machine("logs", "--follow") == [["@3", "1", "no-such-program: not found"], ["@3", "exit", "127"]]


def test_progress_is_the_newest_finished_checkpoint(machine: Machine, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoints"
    assert machine("progress", os.fspath(folder)) == [["@3", "progress", "-1"]]
    for name in ("5", "40", "45.orbax-checkpoint-tmp-1", "notes"):
        (folder / name).mkdir(parents=True)
    assert machine("progress", os.fspath(folder)) == [["@3", "progress", "40"]]


def running(machine: Machine, job: str) -> bool:
    return pathlib.Path(f"/proc/{machine.pid(job)}/cmdline").exists()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
